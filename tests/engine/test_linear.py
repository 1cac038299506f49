"""Merged projections and 4-bit weights compute what the separate layers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune.config import Configuration, LoadGroup
from autotune.engine.decode import Engine
from autotune.engine.linear import Merged, Slice, siblings
from autotune.engine.load import load_model
from tests.tiny_models import PROMPT, make_model


@pytest.mark.parametrize(("name", "layers"), [("llama", 10), ("qwen3", 10), ("gpt-neox", 0)])
def test_projections_of_the_same_input_are_found(name: str, layers: int) -> None:
    assert len(siblings(make_model(name))) == layers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_merged_projections_give_the_same_text(tmp_path: Path, name: str) -> None:
    make_model(name).save_pretrained(tmp_path)
    texts = []
    for merge in (False, True):
        model = load_model(tmp_path, weights="fp32", lm_head="fp32", merge=merge)
        assert any(isinstance(module, Slice) for module in model.modules()) == (merge and name != "gpt-neox")
        engine = Engine(model, None, LoadGroup(), "cpu")
        texts.append(engine.generate(PROMPT, Configuration(), 40).tokens)
    assert len(set(texts[0])) > 5
    assert texts[0] == texts[1]


def test_weights_without_a_product_for_few_tokens_are_not_merged(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, weights="quanto-int8", lm_head="fp32", merge=True)
    assert not any(isinstance(module, Slice) for module in model.modules())


def test_a_merged_product_is_computed_once_and_let_go() -> None:
    calls = []
    linear = torch.nn.Linear(4, 6)
    linear.register_forward_hook(lambda *_: calls.append(1))
    merged = Merged(linear, [1, 2, 3])
    slices = [Slice(merged, index) for index in range(3)]
    for _ in range(2):
        states = torch.randn(1, 5, 4)
        whole = torch.cat([part(states) for part in slices], dim=-1)
        torch.testing.assert_close(whole, torch.nn.functional.linear(states, linear.weight, linear.bias))
        assert merged.input is None
        assert merged.outputs == [None] * 3
    assert len(calls) == 2


def test_a_slice_that_is_called_with_another_input_computes_its_own() -> None:
    linear = torch.nn.Linear(4, 6)
    merged = Merged(linear, [2, 4])
    first, second = torch.randn(2, 1, 3, 4)
    Slice(merged, 0)(first)
    torch.testing.assert_close(Slice(merged, 1)(second), linear(second)[..., 2:])
    torch.testing.assert_close(Slice(merged, 0)(first), linear(first)[..., :2])
