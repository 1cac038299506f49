# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Attention of a few queries over a cache in 4 bits, and what it shares with the kernel for long ones beside it."""

from __future__ import annotations

import triton
import triton.language as tl

from .split_kv import _begin, _range, _softmax


@triton.jit
def _scale_of(pair, BFLOAT: tl.constexpr):
    """The scale in the lower half of an int32, as float32."""
    if BFLOAT:
        result = (pair << 16).to(tl.float32, bitcast=True)
    else:
        result = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return result


@triton.jit
def _minimum_of(pair, BFLOAT: tl.constexpr):
    """The minimum in its upper half."""
    return _scale_of((pair >> 16) & 0xFFFF, BFLOAT)


@triton.jit
def _plus(codes, like):
    """4-bit codes plus 128, in the type of `like`. In bfloat16 that is a matter of bits."""
    if like.dtype == tl.bfloat16:
        result = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        result = codes.to(like.dtype) + 128.0
    return result


@triton.jit
def _scaled_by(rows, pair, like, BFLOAT: tl.constexpr):
    """Rows times the scales of pairs, in the type of `like`, and what their products with codes plus 128 lack."""
    wide = rows.to(tl.float32)
    scaled = (wide * _scale_of(pair, BFLOAT)[None, :]).to(like.dtype)
    return scaled, tl.sum(wide * _minimum_of(pair, BFLOAT)[None, :] - 128.0 * scaled.to(tl.float32), 1)


@triton.jit
def _asked(
    tokens_ptr,
    stored_ptr,
    row,
    head_stride,
    token_stride,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    PARTS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What a program is asked for: its KV head and part, each row's query (where it lies, its position, whether there
    is one), and the positions to attend to with that of the first full-precision slot, as `_range` has them."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    _begin(EARLY)
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token
    used = row < COUNT * HEADS_PER_KV
    query_row = (head * HEADS_PER_KV + row % HEADS_PER_KV) * head_stride + token * token_stride
    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, 4, SLIDING, BLOCK, SHARE)
    return head, part, query_row, position, used, begin, stop, window_begin


@triton.jit
def _part_int4(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_ranges_ptr,
    value_ranges_ptr,
    tokens_ptr,
    stored_ptr,
    partial_ptr,
    statistics_ptr,
    scale,
    query_head_stride,
    query_token_stride,
    slots,
    capacity,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BFLOAT: tl.constexpr,
):
    """As `_part`, for 4 bits: the two codes of a byte belong to the two halves of a token's channels.

    A group's scales multiply the query, and a token's scales its weight, so that codes enter the products as they are.
    Stored blocks are whole and older than every query: without a sliding window none of them is masked.
    """
    HALF: tl.constexpr = DIM // 2
    row = tl.arange(0, ROWS)
    head, part, query_row, position, used, begin, stop, window_begin = _asked(
        tokens_ptr,
        stored_ptr,
        row,
        query_head_stride,
        query_token_stride,
        COUNT,
        HEADS_PER_KV,
        PARTS,
        SLIDING,
        BLOCK,
        BLOCK,
        EARLY,
    )
    half = tl.arange(0, PADDED // 2)
    inside = half < HALF
    asked = used[:, None] & inside[None, :]
    query_ptr += query_row[:, None] + half[None, :]
    query_low = tl.load(query_ptr, mask=asked, other=0.0)
    query_high = tl.load(query_ptr + HALF, mask=asked, other=0.0)
    keys_ptr += head * slots * DIM
    values_ptr += head * slots * DIM
    key_codes_ptr += head * capacity * HALF
    value_codes_ptr += head * capacity * HALF
    key_ranges_ptr += head * (capacity // BLOCK) * DIM
    value_ranges_ptr += head * VALUE_GROUPS * capacity

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result_low = tl.zeros([ROWS, PADDED // 2], tl.float32)
    result_high = tl.zeros([ROWS, PADDED // 2], tl.float32)
    if part == PARTS - 1:
        for start in range(begin, stop, BLOCK):
            at = start + tl.arange(0, BLOCK)
            some = at < stop
            ok = some[:, None] & inside[None, :]
            recent = (at - window_begin)[:, None] * DIM + half[None, :]
            low = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            high = tl.load(keys_ptr + recent + HALF, mask=ok, other=0.0)
            scores = tl.dot(query_low, tl.trans(low), input_precision="ieee")
            scores += tl.dot(query_high, tl.trans(high), input_precision="ieee")
            seen = (at[None, :] <= position[:, None]) & some[None, :]
            if SLIDING > 0:
                seen = seen & (at[None, :] > position[:, None] - SLIDING)
            scores = tl.where(seen, scores * scale, float("-inf"))
            weights, rescale, maximum, total = _softmax(scores, maximum, total)
            low = tl.load(values_ptr + recent, mask=ok, other=0.0)
            high = tl.load(values_ptr + recent + HALF, mask=ok, other=0.0)
            result_low = result_low * rescale[:, None]
            result_high = result_high * rescale[:, None]
            result_low += tl.dot(weights.to(low.dtype), low, input_precision="ieee")
            result_high += tl.dot(weights.to(high.dtype), high, input_precision="ieee")
    else:
        for start in range(begin, stop, BLOCK):
            at = start + tl.arange(0, BLOCK)
            stored = at[:, None] * HALF + half[None, :]
            ranges = key_ranges_ptr + start // BLOCK * DIM + half
            codes = tl.load(key_codes_ptr + stored, mask=inside[None, :], other=0)
            pair = tl.load(ranges, mask=inside, other=0)
            scaled_low, rest_low = _scaled_by(query_low, pair, query_low, BFLOAT)
            pair = tl.load(ranges + HALF, mask=inside, other=0)
            scaled_high, rest_high = _scaled_by(query_high, pair, query_low, BFLOAT)
            scores = tl.dot(scaled_low, tl.trans(_plus(codes & 15, query_low)), input_precision="ieee")
            scores += tl.dot(scaled_high, tl.trans(_plus(codes >> 4, query_low)), input_precision="ieee")
            scores = (scores + (rest_low + rest_high)[:, None]) * scale
            if SLIDING > 0:
                scores = tl.where(at[None, :] > position[:, None] - SLIDING, scores, float("-inf"))
            weights, rescale, maximum, total = _softmax(scores, maximum, total)
            codes = tl.load(value_codes_ptr + stored, mask=inside[None, :], other=0)
            pair = tl.load(value_ranges_ptr + at)
            scaled_low, rest_low = _scaled_by(weights, pair, query_low, BFLOAT)
            scaled_high, rest_high = scaled_low, rest_low
            if VALUE_GROUPS == 2:
                pair = tl.load(value_ranges_ptr + capacity + at)
                scaled_high, rest_high = _scaled_by(weights, pair, query_low, BFLOAT)
            result_low = result_low * rescale[:, None] + rest_low[:, None]
            result_high = result_high * rescale[:, None] + rest_high[:, None]
            result_low += tl.dot(scaled_low, _plus(codes & 15, query_low), input_precision="ieee")
            result_high += tl.dot(scaled_high, _plus(codes >> 4, query_low), input_precision="ieee")

    out = (head * PARTS + part) * ROWS + row
    tl.store(statistics_ptr + out, maximum)
    tl.store(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + out, total)
    if begin < stop:
        place = partial_ptr + out[:, None] * PADDED + half[None, :]
        tl.store(place, result_low, mask=inside[None, :])
        tl.store(place + HALF, result_high, mask=inside[None, :])
