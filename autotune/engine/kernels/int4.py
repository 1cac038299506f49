# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""The product of a few tokens with 4-bit weights (../int4.py says how they are packed), and the weights themselves."""

from __future__ import annotations

import triton
import triton.language as tl


def assembly(whole: bool) -> tuple[str, ...]:
    """For each plane, what makes two weights of two words, a scale and a zero."""
    shifts = ("shl.b32 c, $1, 3;", "shr.u32 c, $1, 1;", "shr.u32 c, $1, 5;", "shr.u32 c, $1, 9;")
    insert = "lop3.b32 c, c, 0x00780078, 0x41804180, 0xEA;"  # (c & mask) | 16 in bfloat16
    weigh = "fma.rn.bf16x2 $0, c, $2, $3;"
    if whole:  # the sum is exact; 1 and -0 make of a multiply-add a sum and a product, which sm_80 has no others of
        weigh = "mov.b32 one, 0x3F803F80; fma.rn.bf16x2 c, c, one, $3;"
        weigh += "mov.b32 one, 0x80008000; fma.rn.bf16x2 $0, c, $2, one;"
    return tuple("{.reg .b32 c, one;" + shift + insert + weigh + "}" for shift in shifts)


@triton.jit
def _weights(words, pair, ASM: tl.constexpr, NUMBER: tl.constexpr, WHOLE: tl.constexpr):
    """One plane of a tile of words [outputs, PLANE]; a pair is a scale (low half) and a zero."""
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
    zero = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
    if ASM is None:
        number = (((words.to(tl.int32) >> (4 * NUMBER)) & 15) + 16).to(tl.float32)
        if WHOLE:
            weights = ((number + zero.to(tl.float32)) * scale.to(tl.float32)).to(tl.bfloat16)
        else:
            weights = (number * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.bfloat16)
    else:
        weights = tl.inline_asm_elementwise(
            ASM[NUMBER], "=r,r,r,r", [words, scale, zero], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return weights


@triton.jit(do_not_specialize=["count", "blocks"])
def _multiply(
    rows,
    packed,
    pairs,
    partial,
    counters,
    output,
    count,
    width,
    blocks,
    stride,
    ASM: tl.constexpr,
    WHOLE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, share = tl.program_id(1), tl.program_id(2)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[None, :]
    feature = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, PLANE)
    known, asked = feature < width, token < count
    each = tl.cdiv(blocks, tl.num_programs(2))
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for block in tl.range(share * each, tl.minimum(blocks, share * each + each), num_stages=STAGES):
        place = (block * width + feature[:, None]) * PLANE + column[None, :]
        words = tl.load(packed + place, mask=known[:, None], other=0)
        for number in tl.static_range(4):
            group = block * (4 * PLANE // GROUP) + number * PLANE // GROUP
            pair = tl.load(pairs + group * width + feature, mask=known, other=0)
            begin = block * (4 * PLANE) + number * PLANE
            states = tl.load(rows + token * stride + begin + column[:, None], mask=asked, other=0)
            weights = _weights(words, pair, ASM, number, WHOLE)
            if ASM is None:  # the interpreter's product takes bfloat16 for integers
                weights, states = weights.to(tl.float32), states.to(tl.float32)
            total = tl.dot(weights, states, total)
    place = token * width + feature[:, None]
    inside = asked & known[:, None]
    if SHARED:
        tl.store(partial + share * (count * width) + place, total, mask=inside)
        tl.debug_barrier()  # all threads' parts are written before one of them says so
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(2) - 1:
            total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            for other in range(tl.num_programs(2)):
                part = partial + other * (count * width) + place
                total += tl.load(part, mask=inside, other=0, cache_modifier=".cg")
            tl.store(output + place, total.to(tl.bfloat16), mask=inside)
            tl.store(counter, 0)
    else:
        tl.store(output + place, total.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["begin", "end"])
def _unpack(
    packed,
    pairs,
    weights,
    begin,
    end,
    width,
    ASM: tl.constexpr,
    WHOLE: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    feature = begin + row
    known = feature < end
    column = tl.arange(0, PLANE)[None, :]
    place = (block * width + feature[:, None]) * PLANE + column
    words = tl.load(packed + place, mask=known[:, None], other=0)
    place = row[:, None].to(tl.int64) * (tl.num_programs(1) * 4 * PLANE) + block * (4 * PLANE) + column
    for number in tl.static_range(4):
        group = block * (4 * PLANE // GROUP) + number * PLANE // GROUP
        pair = tl.load(pairs + group * width + feature, mask=known, other=0)
        tl.store(weights + place + number * PLANE, _weights(words, pair, ASM, number, WHOLE), mask=known[:, None])
