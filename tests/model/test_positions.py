"""The length that a config.json allows, as model cards write it."""

from typing import Any

import pytest

from autotune.model.positions import positions


@pytest.mark.parametrize(
    ("model_type", "stated", "rope", "allowed"),
    [
        ("llama", 2048, None, 2048),
        ("qwen2", 32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ("qwen3", 40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ("deepseek_v3", 163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        ("gpt_oss", 131072, {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        ("llama", 4096, {"type": "yarn", "factor": 16.0}, 65536),
        ("llama", 4096, {"type": "linear", "factor": 4.0}, 16384),
        ("llama", 4096, {"type": "dynamic", "factor": 2.0}, 8192),
        ("gemma3_text", 131072, {"rope_type": "linear", "factor": 8.0}, 131072),
        ("llama", 131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
        ("llama", 8192, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
        ("phi3", 131072, {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, 131072),
        ("phi3", 131072, {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}, 131072),
        ("minicpm3", 32768, {"rope_type": "longrope", "factor": 4.0}, 131072),
        ("llama", 2048, {"rope_type": "default", "factor": 4.0}, 2048),
        ("llama", 2048, {"rope_type": "linear", "factor": "4"}, 2048),
        ("llama", 2048, {"rope_type": "linear", "factor": True}, 2048),
        ("llama", 2048, {"rope_type": "linear"}, 2048),
        ("llama", 2048, "linear", 2048),
        ("llama", None, {"rope_type": "linear", "factor": 4.0}, None),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_length_is_what_the_rope_scaling_allows(
    model_type: str, stated: int | None, rope: Any, allowed: int | None, key: str
) -> None:
    original = {"original_max_position_embeddings": 4096} if model_type == "phi3" else {}
    config = {"max_position_embeddings": stated, key: rope, **original}
    assert positions(model_type, config) == allowed


def test_a_rope_for_each_type_of_layer_counts_by_its_full_attention() -> None:
    layers = {
        "full_attention": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192},
        "sliding_attention": {"rope_type": "default"},
    }
    assert positions("olmo3", {"max_position_embeddings": 8192, "rope_parameters": layers}) == 16384
    assert positions("gpt2", {"n_positions": 1024}) == 1024
