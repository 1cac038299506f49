# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Attention of a few queries over a cache in full precision, in 8 or 2 bits, or in float8: its parts, and their sum.

Each program attends to one part of one KV head's tokens and keeps a running softmax; `_combine` adds the parts of a
query. What 4 bits need beside that is in split_kv_int4.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

OVERLAPS = hasattr(tl.extra.cuda, "gdc_wait")  # whether this Triton knows programmatic dependent launch


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Let the combining kernel be launched already."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _range(
    held,
    stored_ptr,
    part,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):
    """The positions that a part attends to, and the position of the first full-precision slot.

    They begin at a whole block, and are a multiple of SHARE for all parts but the last that has any.
    """
    first = held * 0  # the oldest position that any query sees
    if SLIDING > 0:
        first = tl.maximum(held - SLIDING + 1, 0)
    window_begin = held * 0  # the position of the first full-precision slot
    stop = held + COUNT
    parts: tl.constexpr = PARTS if KIND == 0 else PARTS - 1
    if KIND != 0:
        window_begin = tl.load(stored_ptr).to(tl.int32)
        stop = window_begin
    begin = first // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), SHARE), parts) * SHARE
    begin += part * each
    stop = tl.minimum(stop, begin + each)
    if KIND != 0:
        newest = part == PARTS - 1
        begin = tl.where(newest, tl.maximum(first // BLOCK * BLOCK, window_begin), begin)
        stop = tl.where(newest, held + COUNT, stop)
    return begin, stop, window_begin


@triton.jit
def _softmax(scores, maximum, total):
    """The weights of a block of scores, what earlier results are to be multiplied by, and the new statistics."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # rows that see nothing here
    weights = tl.exp2(scores - safe[:, None])
    rescale = tl.exp2(maximum - safe)
    return weights, rescale, highest, total * rescale + tl.sum(weights, 1)


@triton.jit
def _decoded(codes, position, channel, ok, DIM: tl.constexpr, BITS: tl.constexpr):
    """Stored codes of a tile, as float32: several channels share a byte."""
    packed: tl.constexpr = DIM * BITS // 8
    byte = tl.load(codes + position[:, None] * packed + (channel % packed)[None, :], mask=ok, other=0)
    return ((byte >> ((channel // packed) * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _float8(codes, scales, position, channel, ok, some, DIM: tl.constexpr):
    """float8 e4m3 from its bits, for GPUs that lack the type: as a float16 it is 2^8 times too small."""
    byte = tl.load(codes + position[:, None] * DIM + channel[None, :], mask=ok, other=0).to(tl.int16)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    scale = tl.load(scales + position, mask=some, other=0).to(tl.float32)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)[:, None]


@triton.jit
def _part(
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
    KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """One part of one KV head's tokens: the unnormalized result, its running maximum and its sum."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    kv_heads = tl.num_programs(0)
    _begin(EARLY)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token  # of each row's query
    used = row < COUNT * HEADS_PER_KV
    query_row = (head * HEADS_PER_KV + row % HEADS_PER_KV) * query_head_stride + token * query_token_stride
    query = tl.load(
        query_ptr + query_row[:, None] + channel[None, :], mask=used[:, None] & (channel < DIM)[None, :], other=0.0
    )

    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, KIND, SLIDING, BLOCK, BLOCK)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED], tl.float32)
    head = head.to(tl.int64)
    for start in range(begin, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        some = at < stop
        ok = some[:, None] & (channel < DIM)[None, :]
        recent = head * slots * DIM + (at - window_begin)[:, None] * DIM + channel[None, :]
        if KIND == 0:  # noqa: SIM114 - KIND is known when compiling, `part` is not
            key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            value = tl.load(values_ptr + recent, mask=ok, other=0.0)
        elif part == PARTS - 1:
            key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            value = tl.load(values_ptr + recent, mask=ok, other=0.0)
        elif KIND == 16:
            base = head * capacity
            key = _float8(key_codes_ptr + base * DIM, key_ranges_ptr + base, at, channel, ok, some, DIM)
            value = _float8(value_codes_ptr + base * DIM, value_ranges_ptr + base, at, channel, ok, some, DIM)
            key = key.to(query.dtype)
            value = value.to(query.dtype)
        else:
            packed: tl.constexpr = DIM * KIND // 8
            inside = channel < DIM
            range_ptr = key_ranges_ptr + 2 * ((head * (capacity // BLOCK) + start // BLOCK) * DIM + channel)
            key = _decoded(key_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            key_scale = tl.load(range_ptr, mask=inside, other=0.0).to(tl.float32)
            key_minimum = tl.load(range_ptr + 1, mask=inside, other=0.0).to(tl.float32)
            key = (key * key_scale[None, :] + key_minimum[None, :]).to(query.dtype)
            value = _decoded(value_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            value_group = head * (DIM // VALUE_GROUP) + channel // VALUE_GROUP
            range_2d = value_ranges_ptr + 2 * (value_group[None, :] * capacity + at[:, None])
            value_scale = tl.load(range_2d, mask=ok, other=0.0).to(tl.float32)
            value_minimum = tl.load(range_2d + 1, mask=ok, other=0.0).to(tl.float32)
            value = (value * value_scale + value_minimum).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (at[None, :] <= position[:, None]) & some[None, :]
        if SLIDING > 0:
            seen = seen & (at[None, :] > position[:, None] - SLIDING)
        scores = tl.where(seen, scores, float("-inf"))
        weights, rescale, maximum, total = _softmax(scores, maximum, total)
        result = result * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")

    out = (head * PARTS + part) * ROWS + row
    tl.store(statistics_ptr + out, maximum)
    tl.store(statistics_ptr + kv_heads * PARTS * ROWS + out, total)
    if begin < stop:
        tl.store(partial_ptr + out[:, None] * PADDED + channel[None, :], result)


@triton.jit
def _combine(
    partial_ptr,
    statistics_ptr,
    output_ptr,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One query's output of one head, from all parts."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.arange(0, PARTS_PADDED)
    channel = tl.arange(0, PADDED)
    at = (head * PARTS + part) * ROWS + row
    if EARLY:
        tl.extra.cuda.gdc_wait()
    maximum = tl.load(statistics_ptr + at, mask=part < PARTS, other=float("-inf"))
    total = tl.load(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + at, mask=part < PARTS, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    some = maximum > float("-inf")
    result = tl.load(partial_ptr + at[:, None] * PADDED + channel[None, :], mask=some[:, None], other=0.0)
    result = tl.sum(result * weight[:, None], 0) / tl.sum(total * weight, 0)
    out = (row // HEADS_PER_KV) * (tl.num_programs(0) * HEADS_PER_KV) + head * HEADS_PER_KV + row % HEADS_PER_KV
    tl.store(output_ptr + out * DIM + channel, result.to(output_ptr.dtype.element_ty), mask=channel < DIM)
