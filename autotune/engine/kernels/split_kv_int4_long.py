# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Attention of a few queries over a long cache in 4 bits: each warp attends to blocks of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from .split_kv_int4 import _asked, _minimum_of, _scale_of

# A 32-bit register of a GPU holds two bfloat16 numbers, or two words of four codes each. In bfloat16, 128 + code is a
# matter of bits.
ASSEMBLY = tuple(
    "{.reg .b32 c; " + f"shr.u32 c, $1, {shift}; lop3.b32 $0, c, 0x000F000F, 0x43004300, 0xEA;" + "}"
    for shift in (0, 4, 8, 12)
)


@triton.jit
def _offset(words, like, NUMBER: tl.constexpr, ASM: tl.constexpr):
    """128 + code for one of the four codes of each word, in the type of `like`."""
    if ASM is None:
        result = (((words.to(tl.int32) >> (4 * NUMBER)) & 15).to(tl.float32) + 128.0).to(like.dtype)
    else:
        result = tl.inline_asm_elementwise(ASM[NUMBER], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _minimum(pair, like, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """The minimums of pairs of a scale (low half) and a minimum, in the type of `like`."""
    if ASM is None:
        result = _minimum_of(pair, BFLOAT).to(like.dtype)
    else:
        take: tl.constexpr = "prmt.b32 $0, $1, $2, 0x7632;"
        result = tl.inline_asm_elementwise(take, "=r,r,r", [pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _scaled(query, pair, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """The query times the scales of pairs."""
    if ASM is None:
        result = (query.to(tl.float32) * _scale_of(pair, BFLOAT)).to(query.dtype)
    else:
        times: tl.constexpr = (
            "{.reg .b32 s, z; prmt.b32 s, $2, $3, 0x5410; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, s, z;}"
        )
        result = tl.inline_asm_elementwise(times, "=r,r,r,r", [query, pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _weighted(weights, pair, like, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """Float32 weights times the scales of pairs, in the type of `like`."""
    if ASM is None:
        result = (weights * _scale_of(pair, BFLOAT)).to(like.dtype)
    else:
        times: tl.constexpr = (
            "{.reg .b32 a, b; shl.b32 a, $3, 16; shl.b32 b, $4, 16; mul.f32 a, $1, a; mul.f32 b, $2, b; "
            "cvt.rn.bf16x2.f32 $0, b, a;}"
        )
        result = tl.inline_asm_elementwise(
            times, "=r,r,r,r,r", [weights, pair], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return result


@triton.jit
def _rounded(weights, like, ASM: tl.constexpr):
    if ASM is None:
        result = weights.to(like.dtype)
    else:
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weights], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return result


@triton.jit
def _power(exponent, ASM: tl.constexpr):
    if ASM is None:
        result = tl.exp2(exponent)
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _merged(result, factor):
    """What all warps hold of a part."""
    return tl.sum(result * factor[:, :, None], 0)


@triton.jit
def _merging(maximum, scale, ASM: tl.constexpr):
    """The maximum over all warps, and what each warp's results are to be multiplied by."""
    best = tl.max(maximum, 0)
    return best, _power((maximum - tl.where(best == float("-inf"), 0.0, best)[None, :]) * scale, ASM)


@triton.jit
def _weighed(weights, plain, pair, less_value, rest, rescale, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """Weights times the scales of a half of the channels, and what their products with codes plus 128 lack."""
    scaled = _weighted(weights, tl.broadcast_to(pair[:, None, :], weights.shape), plain, BFLOAT, ASM)
    least = tl.broadcast_to(_minimum(pair, plain, BFLOAT, ASM)[:, :, None], less_value.shape)
    rest = tl.dot(plain, least, rest * rescale, input_precision="ieee")
    return scaled, tl.dot(scaled, less_value, rest, input_precision="ieee")


@triton.jit
def _recent_long(
    query_ptr,
    keys_ptr,
    values_ptr,
    first,
    position,
    used,
    warp,
    begin,
    stop,
    window_begin,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SLIDING: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """The part in full precision: each warp's maximum, sum and result."""
    RECENT: tl.constexpr = 32
    channel = tl.arange(0, PADDED)
    within = (channel < DIM)[None, :]
    query = tl.load(query_ptr + channel[None, :], mask=used & within, other=0.0)
    query = tl.broadcast_to(query[None, :, :], (WARPS, EACH, PADDED))
    keys_ptr += first
    values_ptr += first
    maximum = tl.full([WARPS, EACH], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, EACH], tl.float32)
    result = tl.zeros([WARPS, EACH, PADDED], tl.float32)
    for start in tl.range(begin, stop, WARPS * RECENT, num_stages=1):
        at = start + warp[:, None] * RECENT + tl.arange(0, RECENT)[None, :]
        some = at < stop
        ok = some[:, :, None] & within[None, :, :]
        recent = (at - window_begin)[:, :, None] * DIM + channel[None, None, :]
        key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
        value = tl.load(values_ptr + recent, mask=ok, other=0.0)
        scores = tl.dot(query, tl.trans(key, (0, 2, 1)), input_precision="ieee")
        seen = (at[:, None, :] <= position[None, :, None]) & some[:, None, :]
        if SLIDING > 0:
            seen = seen & (at[:, None, :] > position[None, :, None] - SLIDING)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 2))
        safe = tl.where(highest == float("-inf"), 0.0, highest)  # rows that see nothing here
        weights = _power((scores - safe[:, :, None]) * scale, ASM)
        rescale = _power((maximum - safe) * scale, ASM)
        total = total * rescale + tl.sum(weights, 2)
        maximum = highest
        result = result * rescale[:, :, None]
        result = tl.dot(_rounded(weights, query, ASM), value, result, input_precision="ieee")
    return maximum, total, result


@triton.jit
def _scored(
    query_0,
    query_1,
    query_2,
    query_3,
    words,
    pairs_low,
    pairs_high,
    less_key,
    BLOCK: tl.constexpr,
    BFLOAT: tl.constexpr,
    ASM: tl.constexpr,
):
    """The products of the queries with a block's words, and what they lack in eight equal columns."""
    WARPS: tl.constexpr = less_key.shape[0]
    COLUMNS: tl.constexpr = less_key.shape[1]
    EACH: tl.constexpr = query_0.shape[0]
    scores = tl.zeros([WARPS, EACH, BLOCK], tl.float32)
    rest = tl.zeros([WARPS, EACH, 8], tl.float32)
    for number in tl.static_range(4):
        pair = ((pairs_low if number % 2 == 0 else pairs_high) >> (number // 2 * 32)).to(tl.int32)
        if number == 0:
            query = query_0
        elif number == 1:
            query = query_1
        elif number == 2:
            query = query_2
        else:
            query = query_3
        query = tl.broadcast_to(query[None, :, :], (WARPS, EACH, COLUMNS))
        scaled = _scaled(query, tl.broadcast_to(pair[:, None, :], (WARPS, EACH, COLUMNS)), BFLOAT, ASM)
        least = tl.broadcast_to(_minimum(pair, query, BFLOAT, ASM)[:, :, None], (WARPS, COLUMNS, 8))
        rest = tl.dot(query, least, rest, input_precision="ieee")
        rest = tl.dot(scaled, less_key, rest, input_precision="ieee")
        codes = tl.trans(_offset(words, query, number, ASM), (0, 2, 1))
        scores = tl.dot(scaled, codes, scores, input_precision="ieee")
    return scores, rest


@triton.jit
def _stored_long(
    query_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_ranges_ptr,
    value_ranges_ptr,
    head,
    position,
    used,
    warp,
    begin,
    stop,
    scale,
    capacity,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BFLOAT: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """A part in 4 bits: each warp's maximum and sum, the results of a word's four codes, and what both halves lack."""
    QUARTER: tl.constexpr = DIM // 4
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, COLUMNS)
    inside = (column < QUARTER)[None, :]
    queries = query_ptr[:, :, None] + 2 * column[None, :, None] + tl.arange(0, 2)[None, None, :]
    asked = used[:, :, None] & inside[:, :, None]
    query_0, query_2 = tl.split(tl.load(queries, mask=asked, other=0.0))
    query_1, query_3 = tl.split(tl.load(queries + HALF, mask=asked, other=0.0))
    key_codes_ptr += head * capacity * QUARTER
    value_codes_ptr += head * capacity * QUARTER
    key_pairs_ptr = (key_ranges_ptr + head * (capacity // BLOCK) * DIM).to(tl.pointer_type(tl.int64))
    value_ranges_ptr += head * VALUE_GROUPS * capacity
    less_key = tl.full([WARPS, COLUMNS, 8], -128.0, query_0.dtype)
    less_value = tl.full([WARPS, BLOCK, 8], -128.0, query_0.dtype)
    maximum = tl.full([WARPS, EACH], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, EACH], tl.float32)
    result_0 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
    result_1 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
    result_2 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
    result_3 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
    rest_low = tl.zeros([WARPS, EACH, 8], tl.float32)
    rest_high = tl.zeros([WARPS, EACH, 8], tl.float32)
    for start in range(begin, stop, WARPS * BLOCK):
        some = start + warp * BLOCK < stop
        first = tl.minimum(start + warp * BLOCK, stop - BLOCK)  # a warp without a block repeats the last in vain
        at = first[:, None] + tl.arange(0, BLOCK)[None, :]
        stored = at[:, :, None] * QUARTER + column[None, None, :]
        words = tl.load(key_codes_ptr + stored, mask=inside[None, :, :], other=0)
        ranges = key_pairs_ptr + first[:, None] // BLOCK * HALF + column[None, :]
        pairs_low = tl.load(ranges, mask=inside, other=0)
        pairs_high = tl.load(ranges + QUARTER, mask=inside, other=0)
        scores, rest = _scored(
            query_0, query_1, query_2, query_3, words, pairs_low, pairs_high, less_key, BLOCK, BFLOAT, ASM
        )
        if SLIDING > 0:
            scores = tl.where(at[:, None, :] > position[None, :, None] - SLIDING, scores, float("-inf"))
        added = tl.max(rest, 2)
        highest = tl.maximum(maximum, tl.where(some[:, None], tl.max(scores, 2) + added, float("-inf")))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        less = tl.where(some[:, None], (safe - added) * scale, float("inf"))
        weights = _power(scores * scale - less[:, :, None], ASM)
        rescale = _power((maximum - safe) * scale, ASM)
        total = total * rescale + tl.sum(weights, 2)
        maximum = highest
        rescale = rescale[:, :, None]
        words = tl.load(value_codes_ptr + stored, mask=inside[None, :, :], other=0)
        plain = _rounded(weights, query_0, ASM)
        pair = tl.load(value_ranges_ptr + at)
        low, rest_low = _weighed(weights, plain, pair, less_value, rest_low, rescale, BFLOAT, ASM)
        high = low
        if VALUE_GROUPS == 2:
            pair = tl.load(value_ranges_ptr + capacity + at)
            high, rest_high = _weighed(weights, plain, pair, less_value, rest_high, rescale, BFLOAT, ASM)
        result_0 = tl.dot(low, _offset(words, query_0, 0, ASM), result_0 * rescale, input_precision="ieee")
        result_1 = tl.dot(high, _offset(words, query_0, 1, ASM), result_1 * rescale, input_precision="ieee")
        result_2 = tl.dot(low, _offset(words, query_0, 2, ASM), result_2 * rescale, input_precision="ieee")
        result_3 = tl.dot(high, _offset(words, query_0, 3, ASM), result_3 * rescale, input_precision="ieee")
    return maximum, total, result_0, result_1, result_2, result_3, rest_low, rest_high


@triton.jit
def _part_int4_long(
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
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `_part`, for 4 bits: each warp attends to blocks of its own, so that none waits for another before the end.

    For that the first dimension of every tensor is the warp. Two bytes are read as a word: its four codes, of the
    channels 2j, 2j + head_dim / 2 and their next, have products of their own. A block's scales multiply the query, and
    a token's scales its weight, so that codes enter the products as they are, plus 128; what that adds, and the
    minimums, is itself left to products, with eight equal columns. Stored blocks are whole and older than every query:
    without a sliding window none of their tokens is masked.
    """
    QUARTER: tl.constexpr = DIM // 4
    HALF: tl.constexpr = DIM // 2
    COLUMNS: tl.constexpr = PADDED // 4 if PADDED >= 64 else 16
    warp = tl.arange(0, WARPS)
    row = tl.program_id(2) * EACH + tl.arange(0, EACH)
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
        BLOCK * WARPS,
        EARLY,
    )
    used = used[:, None]
    query_ptr += query_row[:, None]
    out = (head * PARTS + part) * ROWS + row
    place = partial_ptr + out[:, None] * PADDED
    if part == PARTS - 1:
        channel = tl.arange(0, PADDED)
        maximum, total, result = _recent_long(
            query_ptr,
            keys_ptr,
            values_ptr,
            head * slots * DIM,
            position,
            used,
            warp,
            begin,
            stop,
            window_begin,
            scale,
            DIM,
            PADDED,
            SLIDING,
            EACH,
            WARPS,
            ASM,
        )
        best, factor = _merging(maximum, scale, ASM)
        if begin < stop:
            tl.store(place + channel[None, :], _merged(result, factor), mask=used & (channel < DIM)[None, :])
    else:
        maximum, total, result_0, result_1, result_2, result_3, rest_low, rest_high = _stored_long(
            query_ptr,
            key_codes_ptr,
            value_codes_ptr,
            key_ranges_ptr,
            value_ranges_ptr,
            head,
            position,
            used,
            warp,
            begin,
            stop,
            scale,
            capacity,
            DIM,
            COLUMNS,
            SLIDING,
            BLOCK,
            VALUE_GROUPS,
            BFLOAT,
            EACH,
            WARPS,
            ASM,
        )
        best, factor = _merging(maximum, scale, ASM)
        if begin < stop:
            more_low = tl.max(rest_low, 2)[:, :, None]
            more_high = more_low
            if VALUE_GROUPS == 2:
                more_high = tl.max(rest_high, 2)[:, :, None]
            column = tl.arange(0, COLUMNS)
            even = place + 2 * column[None, :]
            ok = used & (column < QUARTER)[None, :]
            tl.store(even, _merged(result_0 + more_low, factor), mask=ok)
            tl.store(even + HALF, _merged(result_1 + more_high, factor), mask=ok)
            tl.store(even + 1, _merged(result_2 + more_low, factor), mask=ok)
            tl.store(even + HALF + 1, _merged(result_3 + more_high, factor), mask=ok)
    tl.store(statistics_ptr + out, best * scale)
    tl.store(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + out, tl.sum(total * factor, 0))
