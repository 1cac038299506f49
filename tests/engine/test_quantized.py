"""Stored tokens: nothing is lost in packing, and numbers come back rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.engine.cache import GROUP, Float8Layer, make_cache
from autotune.engine.cache.quantized import _numbers, _pack, _unpack
from tests.tiny_models import HEADS, QUANTIZED, tiny


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([8, 4, 2]),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 5),
    quarters=st.integers(1, 9),
)
def test_packing_loses_nothing(bits, seed, tokens, quarters):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (1, 2, tokens, 4 * quarters), generator=generator, dtype=torch.uint8)
    packed = _pack(values, bits)
    assert packed.shape[-1] * 8 == values.shape[-1] * bits
    assert torch.equal(_unpack(packed, bits), values)


def test_the_layout_of_a_packed_byte_is_as_documented():
    four = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert _pack(four, 4).tolist() == [[1 | 3 << 4, 2 | 4 << 4]]
    two = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8)
    assert _pack(two, 2).tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]]


def test_moving_the_bits_of_float8_gives_the_numbers_that_they_stand_for():
    codes = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 < 127].view(torch.float8_e4m3fn)  # no NaN
    moved = _numbers(codes, torch.empty(0))
    assert torch.equal(moved, codes.float())
    assert torch.equal(moved.signbit(), codes.float().signbit())


@pytest.mark.parametrize("word", QUANTIZED)
def test_in_bfloat16_stored_tokens_are_rounded_once(word):
    """What is read is what float32 gives, rounded."""
    new = [
        torch.randn((1, HEADS, 4 * GROUP, 64), generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1)
    ]
    layer = make_cache(word, tiny("llama").config, 300, "cpu").layers[0]
    layer.update(*new)
    newest = [states[:, :, :1] for states in new]
    reads = [
        layer.read(*(states.to(dtype) for states in newest), layer.stored) for dtype in (torch.bfloat16, torch.float32)
    ]
    for read, exact in zip(*reads, strict=True):
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, exact.bfloat16())


def test_fp8_takes_keys_and_values_of_different_sizes():
    layer = Float8Layer(128)
    keys, values = torch.randn(1, 2, 100, 12), torch.randn(1, 2, 100, 8)
    layer.update(keys, values)
    read = layer.update(keys[:, :, :1], values[:, :, :1])
    assert [tensor.shape[-1] for tensor in read] == [12, 8]
    assert layer.stored == GROUP
