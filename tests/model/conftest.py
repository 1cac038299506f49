"""The shapes that the plan's tests share."""

from __future__ import annotations

import pytest

from autotune.model.shape import ModelShape
from tests.shapes import LLAMA_1B, LLAMA_8B, shape_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of(tmp_path_factory.mktemp("8b"), LLAMA_8B)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of(tmp_path_factory.mktemp("1b"), LLAMA_1B)


@pytest.fixture(scope="module")
def small_draft(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Llama-3.2-1B."""
    return shape_of(tmp_path_factory.mktemp("1b-tied"), LLAMA_1B | {"head_dim": 64, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    config = LLAMA_1B | {"model_type": "gemma3_text", "sliding_window": 512, "tie_word_embeddings": True}
    return shape_of(tmp_path_factory.mktemp("hybrid"), config)
