# ruff: noqa: E402 - the interpreter must be asked for before the kernels are defined
"""The 4-bit product against PyTorch's on unpacked weights, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from autotune.engine import int4
from autotune.engine import linear as linear_module
from autotune.engine.linear import MANY, Int4Linear, Padded, _quantize_rows, _row_blocks, fits_int4, int4_multiplies
from autotune.engine.load import quantize
from autotune.model.weights import int4_group

TOLERANCE = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts bfloat16 off where a GPU rounds


def random_codes(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros, and the weights that they stand for, in float64."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    size = int4_group(inputs)
    scale_zero = torch.randn((inputs // size, outputs, 2), generator=generator).bfloat16()
    weights = torch.empty((outputs, inputs), dtype=torch.float64)
    for group in range(inputs // size):
        part = slice(size * group, size * group + size)
        scale, zero = scale_zero[group].double().unbind(1)
        weights[:, part] = (16 + codes[:, part].double()) * scale[:, None] + zero[:, None]
    return codes.to(DEVICE), scale_zero.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize(("inputs", "plane"), [(128, 32), (384, 32), (256, 64), (768, 64), (64, 16), (576, 16)])
def test_unpacked_weights_are_those_that_were_packed(inputs: int, plane: int) -> None:
    codes, scale_zero, weights = random_codes(37, inputs)
    packed = int4.pack(codes)
    assert packed.shape == (inputs // plane // 4, 37, plane)
    assert packed.dtype == torch.int16
    torch.testing.assert_close(int4.unpack_slowly(packed, scale_zero).double(), weights, rtol=2**-8, atol=0)
    unpacked = int4.unpack(packed, scale_zero, 3, 36).double()
    torch.testing.assert_close(unpacked, weights[3:36], rtol=TOLERANCE, atol=0)


def product_error(
    inputs: int, outputs: int, tokens: int, tiles: tuple[int, int, int, int] | None = None, stride: int = 0
) -> float:
    """The error of a product relative to its norm; two in turn are the same, and leave the counters at zero."""
    codes, scale_zero, weights = random_codes(outputs, inputs)
    rows = torch.randn((tokens, inputs + stride), generator=torch.Generator().manual_seed(tokens)).bfloat16()
    rows, counters = rows.to(DEVICE)[:, :inputs], int4.counters(outputs, DEVICE)
    first, second = (int4.multiply(rows, int4.pack(codes), scale_zero, counters, tiles=tiles) for _ in range(2))
    assert torch.equal(first, second)
    assert not counters.any()
    expected = rows.double() @ weights.T
    return ((first.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16, 17])
def test_products_of_a_few_tokens(tokens: int) -> None:
    assert product_error(512, 72, tokens) < 0.012


@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("inputs", [64, 192, 576])
def test_products_of_widths_that_128_do_not_divide(inputs: int, tokens: int) -> None:
    assert product_error(inputs, 72, tokens) < 0.012
    assert product_error(inputs, 72, tokens, (32, 2, 2, 2)) < 0.012


@pytest.mark.parametrize(("inputs", "kind"), [(576, Int4Linear), (512, Int4Linear), (100, Padded)])
def test_a_layer_of_any_width_is_our_own_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, inputs: int, kind: type[torch.nn.Module]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        quantize, "fits_int4", lambda layer, _: int4_multiplies(gpu, layer.weight.dtype, 40, layer.in_features)
    )
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, 40).bfloat16().to(DEVICE)
    states = torch.randn(2, MANY, inputs).bfloat16().to(DEVICE)
    expected = layer(states)
    packed = quantize.quantize_linear(layer, "quanto-int4", DEVICE)
    assert type(packed) is kind
    assert isinstance(getattr(packed, "linear", packed), Int4Linear)
    for part in (states, states[:, :3]):
        found = packed(part)
        assert (found - expected[:, : part.shape[1]]).float().norm() < 0.15 * found.float().norm()


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 40), (512, 33), (1280, 7)])
def test_products_whose_inputs_are_shared_out(inputs: int, outputs: int, shares: int) -> None:
    assert product_error(inputs, outputs, 3, (32, shares, 2, 2)) < 0.012


def test_rows_that_lie_apart_and_rows_that_lie_across() -> None:
    assert product_error(256, 40, 3, stride=24) < 0.012
    codes, scale_zero, weights = random_codes(40, 256)
    across = torch.randn((256, 3), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE).T
    found = int4.multiply(across, int4.pack(codes), scale_zero, int4.counters(40, DEVICE)).double()
    assert (found - across.double() @ weights.T).norm() < 0.012 * found.norm()


def test_four_bit_codes_are_within_half_a_step_of_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256).bfloat16() + torch.linspace(-3, 3, 64)[:, None].bfloat16()
    codes, scale_zero = _quantize_rows(weight)
    assert codes.max() == 15
    assert codes.min() == 0
    scale, zero = scale_zero.transpose(0, 1).float().split(1, dim=2)
    error = (((codes.float() + 16).unflatten(1, (2, 128))) * scale + zero).flatten(1) - weight.float()
    assert (error.abs().unflatten(1, (2, 128)) <= 0.6 * scale).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_few_tokens_and_many_the_same_product(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(linear_module, "UNPACKED", 20 * 256)  # several parts of whole tiles, the last one smaller
    monkeypatch.setattr(linear_module, "TILE", 16)
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 40, bias=bias).bfloat16().to(DEVICE)
    packed = Int4Linear(layer, DEVICE)
    states = torch.randn(1, MANY + 4, 256).bfloat16().to(DEVICE)
    few = torch.cat([packed(part) for part in states.split(20, dim=1)], dim=1)
    torch.testing.assert_close(packed(states), few, rtol=0.02, atol=0.02)
    torch.testing.assert_close(few, layer(states), rtol=0.2, atol=0.2)


def test_weights_are_unpacked_by_whole_tiles() -> None:
    assert _row_blocks(4096, 14336) == [(0, 1152), (1152, 2304), (2304, 3456), (3456, 4096)]
    assert _row_blocks(300, 2**24) == [(0, 128), (128, 256), (256, 300)]


def test_the_operation_for_the_compiler_is_the_product() -> None:
    codes, scale_zero, _ = random_codes(40, 256)
    rows = torch.randn((3, 256), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    arguments = (rows, int4.pack(codes), scale_zero, int4.counters(40, DEVICE), False)
    assert torch.equal(int4.product(*arguments), int4.multiply(*arguments))
    with FakeTensorMode() as mode:
        fake = int4.product(*(mode.from_tensor(argument) for argument in arguments[:4]), False)
    assert (fake.shape, fake.dtype) == ((3, 40), torch.bfloat16)


def test_layers_on_a_cpu_are_left_to_quanto() -> None:
    assert not fits_int4(torch.nn.Linear(256, 40).bfloat16(), "cpu")


@pytest.mark.gpu
def test_a_recorded_product_follows_its_input_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4096, 4096, bias=False, device="cuda").bfloat16()
    assert fits_int4(layer, DEVICE)
    packed = Int4Linear(layer, DEVICE)
    states = torch.randn(1, 5, 4096, device="cuda").bfloat16()
    packed(states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = packed(states)
    for _ in range(3):
        states.copy_(torch.randn_like(states))
        graph.replay()
        assert torch.equal(output, packed(states))
        assert (output - layer(states)).float().norm() < 0.15 * layer(states).float().norm()


def test_codes_of_somebody_else_give_the_product_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "UNPACKED", 20 * 256)  # several parts of whole tiles, the last one smaller
    monkeypatch.setattr(linear_module, "TILE", 16)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 256), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 16, (2, 40), dtype=torch.uint8, generator=generator)
    scale = torch.rand((2, 40), generator=generator).half()
    bias = torch.nn.Parameter(torch.randn(40, generator=generator).bfloat16(), requires_grad=False)
    weight = (codes.float().unflatten(1, (2, 128)) - zero.T[..., None]) * scale.T[..., None].float()
    layer = Int4Linear.from_codes(codes.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE), bias.to(DEVICE))
    states = torch.randn((1, 3 + MANY, 256), generator=generator).bfloat16()
    for part in states.split([3, MANY], dim=1):
        expected = torch.nn.functional.linear(part.float(), weight.flatten(1), bias.float())
        assert (layer(part.to(DEVICE)).float().cpu() - expected).norm() / expected.norm() < 0.01
