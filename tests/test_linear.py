"""Merged projections and 4-bit weights compute what the separate layers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_graph import PROMPT, make_model

from autotune.config import Configuration, LoadGroup
from autotune.engine import linear as linear_module
from autotune.engine.decode import Engine
from autotune.engine.linear import Int4Linear, Merged, Slice, _quantize_rows, siblings
from autotune.engine.load import load_model


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


def test_four_bit_codes_are_within_half_a_step_of_the_weight() -> None:
    weight = torch.randn(8, 256).bfloat16()
    packed, scale_zero = _quantize_rows(weight)
    codes = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1).float().unflatten(1, (2, 128))
    scale, zero = scale_zero.transpose(0, 1).float().split(1, dim=2)
    error = ((codes - 8) * scale + zero).flatten(1) - weight.float()
    assert (error.abs().unflatten(1, (2, 128)) <= 0.56 * scale).all()


ORDER = torch.randperm(1024, generator=torch.Generator().manual_seed(0))  # a layout that no code knows


def pack_somehow(codes: torch.Tensor) -> torch.Tensor:
    whole = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)
    tiles = whole.unflatten(0, (-1, 8)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)[..., ORDER]
    packed = tiles[..., ::2] | tiles[..., 1::2] << 4
    return packed.contiguous().view(torch.int32).unflatten(2, (32, 4))


def multiply_slowly(rows: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor) -> torch.Tensor:
    stored = packed.view(torch.uint8).flatten(2)
    tiles = torch.stack([stored & 15, stored >> 4], dim=3).flatten(2)[..., ORDER.argsort()]
    codes = tiles.unflatten(2, (8, 128)).transpose(1, 2).flatten(0, 1).float()
    scale, zero = scale_zero.transpose(0, 1).float().split(1, dim=2)
    return (rows.float() @ ((codes - 8) * scale + zero).flatten(1).T).to(rows.dtype)


@pytest.fixture
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_pack", pack_somehow)
    monkeypatch.setattr(linear_module, "_multiply", multiply_slowly)
    monkeypatch.setattr(linear_module, "UNPACKED", 16 * 256)  # several parts, the last one smaller
    linear_module._places.cache_clear()


@pytest.mark.usefixtures("_own_kernels")
@pytest.mark.parametrize("bias", [False, True])
def test_unpacked_weights_give_the_product_of_the_packed_ones(bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 40, bias=bias).bfloat16()
    packed = Int4Linear(layer)
    states = torch.randn(1, 200, 256).bfloat16()
    few = torch.cat([packed(part) for part in states.split(100, dim=1)], dim=1)
    torch.testing.assert_close(packed(states), few, rtol=0.02, atol=0.02)
    torch.testing.assert_close(few, layer(states), rtol=0.2, atol=0.2)
    linear_module._places.cache_clear()


@pytest.mark.usefixtures("_own_kernels")
def test_codes_of_somebody_else_give_the_product_of_their_weights() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (40, 256), dtype=torch.uint8)
    scale, zero = torch.rand(2, 40).half(), torch.randint(0, 16, (2, 40), dtype=torch.uint8)
    bias = torch.nn.Parameter(torch.randn(40).bfloat16(), requires_grad=False)
    weight = (codes.float().unflatten(1, (2, 128)) - zero.T[..., None]) * scale.T[..., None].float()
    layer = Int4Linear.from_codes(codes, scale, zero, bias)
    for states in torch.randn(1, 200, 256).bfloat16().split([3, 197], dim=1):
        expected = torch.nn.functional.linear(states.float(), weight.flatten(1), bias.float())
        assert (layer(states) - expected).norm() / expected.norm() < 0.01


@pytest.mark.usefixtures("_own_kernels")
def test_weights_stay_packed_where_the_layout_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_multiply", lambda rows, *_: multiply_slowly(rows, *_) + 1)
    assert linear_module._places("cpu") is None
    linear_module._places.cache_clear()


@pytest.mark.gpu
def test_four_bit_products_are_near_the_layer_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 4096, bias=False, device="cuda").bfloat16()
    packed = Int4Linear(layer)
    linear_module._places.cache_clear()
    assert linear_module._places("cuda:0") is not None
    states = torch.randn(1, 300, 1024, device="cuda").bfloat16()
    few = torch.cat([packed(part) for part in states.split(6, dim=1)], dim=1)
    torch.testing.assert_close(packed(states), few, rtol=0.03, atol=0.03)
    error = (few - layer(states)).float().norm() / layer(states).float().norm()
    assert error < 0.15
