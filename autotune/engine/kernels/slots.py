# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Rows that move to where they belong: of a table into a step, of a step into the cache, of the cache into 4 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATHERED = 1024  # channels of a row that one program copies; chosen, not measured


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows [n, width] of `table` [rows, width], which may lie in locked host memory, that `ids` [n] name."""
    width = table.shape[1]
    rows = torch.empty((len(ids), width), dtype=table.dtype, device=ids.device)
    _gather[(len(ids), triton.cdiv(width, _GATHERED))](table, ids, rows, table.stride(0), width, BLOCK=_GATHERED)
    return rows


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: torch.Tensor,
    stored: torch.Tensor | None,
) -> None:
    """Write `new_keys` and `new_values` [1, heads, n, dim] into slots from `tokens` (less `stored`) on.

    `keys` and `values` are [1, heads, slots, dim]; the two counts are int64 tensors [1] on the device.
    """
    _, heads, count, dim = new_keys.shape
    _append[(heads, count)](
        keys,
        values,
        new_keys,
        new_values,
        tokens,
        stored,
        *keys.stride()[1:3],
        *values.stride()[1:3],
        *new_keys.stride()[1:3],
        *new_values.stride()[1:3],
        STORED=stored is not None,
        DIM=dim,
        VALUE_DIM=new_values.shape[-1],
        PADDED=triton.next_power_of_2(max(dim, new_values.shape[-1])),
    )


def store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_ranges: torch.Tensor,
    value_ranges: torch.Tensor,
    begin: int,
    behind: int = 0,
) -> None:
    """Quantize `keys` and `values` [1, heads, tokens, dim] to 4 bits, from the stored token `begin` on.

    What is written is laid out as `cache.QuantizedLayer` has it, whose group of tokens is that of `key_ranges`. With
    `behind`, that many tokens that follow those given in memory then take their places.
    """
    _, heads, tokens, dim = keys.shape
    capacity = key_codes.shape[2]
    group = capacity // key_ranges.shape[2]
    _store[(heads, tokens // group, 2)](
        keys,
        values,
        key_codes,
        value_codes,
        key_ranges,
        value_ranges,
        begin,
        capacity,
        behind,
        *keys.stride()[1:3],
        *values.stride()[1:3],
        GROUP=group,
        HALF=dim // 2,
        RANGES=value_ranges.shape[2],
        BEHIND=triton.next_power_of_2(behind) if behind else 0,
    )


@triton.jit
def _gather(table, ids, rows, stride, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(table + tl.load(ids + token) * stride + channel, mask=channel < width)
    tl.store(rows + token * width + channel, row, mask=channel < width)


@triton.jit
def _append(
    keys,
    values,
    new_keys,
    new_values,
    tokens,
    stored,
    keys_head,
    keys_slot,
    values_head,
    values_slot,
    new_keys_head,
    new_keys_token,
    new_values_head,
    new_values_token,
    STORED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    head, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(tokens) + token
    if STORED:
        slot -= tl.load(stored)
    channel = tl.arange(0, PADDED)
    key = tl.load(new_keys + head * new_keys_head + token * new_keys_token + channel, mask=channel < DIM)
    tl.store(keys + head * keys_head + slot * keys_slot + channel, key, mask=channel < DIM)
    value = tl.load(new_values + head * new_values_head + token * new_values_token + channel, mask=channel < VALUE_DIM)
    tl.store(values + head * values_head + slot * values_slot + channel, value, mask=channel < VALUE_DIM)


@triton.jit
def _store(
    keys,
    values,
    key_codes,
    value_codes,
    key_ranges,
    value_ranges,
    begin,
    capacity,
    behind,
    key_head,
    key_token,
    value_head,
    value_token,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    RANGES: tl.constexpr,
    BEHIND: tl.constexpr,
):
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = begin + part * GROUP
    channel, token = tl.arange(0, HALF)[None, :], tl.arange(0, GROUP)[:, None]
    if tl.program_id(2) == 0:
        source, stride, codes = keys + head * key_head, key_token, key_codes
        ranges = key_ranges + (head * (capacity // GROUP) + first // GROUP) * HALF * 4
        low, high = _coded_keys(source + (part * GROUP + token) * stride + channel, ranges, HALF)
    else:
        source, stride, codes = values + head * value_head, value_token, value_codes
        ranges = value_ranges + (head * RANGES * capacity + first) * 2
        place = source + (part * GROUP + token) * stride + channel
        low, high = _coded_values(place, ranges, capacity, GROUP, HALF, RANGES)
    at = codes + (head * capacity + first + token) * HALF + channel
    tl.store(at, (low.to(tl.int32) | (high.to(tl.int32) << 4)).to(tl.uint8))
    if BEHIND:
        row = tl.arange(0, BEHIND)[:, None]
        to, inside = source + row * stride + channel, row < behind
        low_behind = tl.load(to + GROUP * stride, mask=inside, other=0)
        high_behind = tl.load(to + GROUP * stride + HALF, mask=inside, other=0)
        tl.debug_barrier()  # every thread has read what is overwritten
        tl.store(to, low_behind, mask=inside)
        tl.store(to + HALF, high_behind, mask=inside)


@triton.jit
def _coded_keys(place, ranges, HALF: tl.constexpr):
    """Codes of the lower and the upper half of the channels, each with a range of its own."""
    low, high = tl.load(place).to(tl.float32), tl.load(place + HALF).to(tl.float32)
    kind: tl.constexpr = ranges.dtype.element_ty
    to = ranges + tl.arange(0, HALF) * 2
    low_scale, low_minimum = _range(tl.min(low, axis=0), tl.max(low, axis=0), kind)
    high_scale, high_minimum = _range(tl.min(high, axis=0), tl.max(high, axis=0), kind)
    tl.store(to, low_scale.to(kind))
    tl.store(to + 1, low_minimum.to(kind))
    tl.store(to + HALF * 2, high_scale.to(kind))
    tl.store(to + HALF * 2 + 1, high_minimum.to(kind))
    low = _coded(low, low_scale[None, :], low_minimum[None, :])
    return low, _coded(high, high_scale[None, :], high_minimum[None, :])


@triton.jit
def _coded_values(place, ranges, capacity, GROUP: tl.constexpr, HALF: tl.constexpr, RANGES: tl.constexpr):
    """Codes of the lower and the upper half of the channels; each token has a range for either, or one for both."""
    low, high = tl.load(place).to(tl.float32), tl.load(place + HALF).to(tl.float32)
    kind: tl.constexpr = ranges.dtype.element_ty
    to = ranges + tl.arange(0, GROUP) * 2
    low_least, low_most = tl.min(low, axis=1), tl.max(low, axis=1)
    high_least, high_most = tl.min(high, axis=1), tl.max(high, axis=1)
    if RANGES == 1:
        low_least = tl.minimum(low_least, high_least)
        low_most = tl.maximum(low_most, high_most)
        high_least = low_least
        high_most = low_most
    low_scale, low_minimum = _range(low_least, low_most, kind)
    high_scale, high_minimum = _range(high_least, high_most, kind)
    tl.store(to, low_scale.to(kind))
    tl.store(to + 1, low_minimum.to(kind))
    if RANGES == 2:
        tl.store(to + capacity * 2, high_scale.to(kind))
        tl.store(to + capacity * 2 + 1, high_minimum.to(kind))
    low = _coded(low, low_scale[:, None], low_minimum[:, None])
    return low, _coded(high, high_scale[:, None], high_minimum[:, None])


@triton.jit
def _range(least, most, kind: tl.constexpr):
    """Scale and minimum of 15 steps from `least` to `most`, as numbers of type `kind`."""
    minimum = least.to(kind).to(tl.float32)
    scale = tl.maximum(tl.div_rn(most - minimum, tl.full(most.shape, 15.0, tl.float32)), 2.0**-20)
    return scale.to(kind).to(tl.float32), minimum


@triton.jit
def _coded(states, scale, minimum):
    """The nearest step; adding and taking away 1.5 * 2^23 rounds to even, as PyTorch does."""
    shape: tl.constexpr = states.shape
    steps = tl.div_rn(states - minimum, tl.broadcast_to(scale, shape)) + 12582912.0 - 12582912.0
    return tl.minimum(tl.maximum(steps, 0.0), 15.0)
