# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""A product of a few tokens with 4-bit weights, whose time is that of reading the weights once.

A weight is (16 + code) * scale + zero, rounded once to bfloat16, with a scale and a zero for INT4_GROUP weights along
the input; or, where somebody else chose the codes, exactly (16 + code + zero) * scale, with a whole zero. 16 + code is
a bfloat16 number whose mantissa holds the code's bits: a shift and a mask make two of them, a multiply-add two weights.
Nothing has to move between threads for that, since the weights are packed to suit: a 16-bit word holds the codes of one
output at four inputs that lie PLANE apart, and so each of its four planes goes into a tensor core's product of its own.

Where a layer has too few outputs to fill the GPU, its inputs are shared out too: each program writes its part of the
sum, and the last to arrive adds the parts in their order, so that the result does not depend on who that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .support import INT4_GROUP

ROWS = 16  # tokens that one program multiplies at most
_NARROW = 32  # the fewest outputs of a program
_MOST = 128  # tokens of one call


def plane(columns: int) -> int:
    """How far apart along the input the four codes of a word are."""
    return 64 if columns % 256 == 0 else 32


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Words, int16 [blocks, outputs, PLANE], of codes 0 to 15, uint8 [outputs, inputs]; a block is 4 * PLANE inputs."""
    first, second, third, fourth = codes.unflatten(1, (-1, 4, plane(codes.shape[1]))).transpose(0, 1).unbind(2)
    return torch.stack([first | second << 4, third | fourth << 4], dim=-1).view(torch.int16).squeeze(-1)


def unpack_slowly(packed: torch.Tensor, scale_zero: torch.Tensor, whole: bool = False) -> torch.Tensor:
    """The weights, bfloat16 [outputs, inputs], on any device; `scale_zero` is [groups, outputs, 2].

    With `whole` zeros are whole numbers, and belong to the codes.
    """
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)[:, None]
    codes = (packed.to(torch.int32)[:, :, None] >> shifts & 15).transpose(0, 1).flatten(1)
    scale, zero = scale_zero.transpose(0, 1).float().split(1, dim=2)
    numbers = (codes + 16).float().unflatten(1, (-1, INT4_GROUP))
    weights = (numbers + zero) * scale if whole else torch.addcmul(zero, numbers, scale)
    return weights.flatten(1).bfloat16()


def unpack(packed: torch.Tensor, scale_zero: torch.Tensor, begin: int, end: int, whole: bool = False) -> torch.Tensor:
    """The weights of the outputs from `begin` to `end`, as `unpack_slowly` gives them."""
    blocks, width, word = packed.shape
    weights = torch.empty((end - begin, blocks * 4 * word), dtype=torch.bfloat16, device=packed.device)
    _unpack[(triton.cdiv(end - begin, 32), blocks)](
        packed,
        scale_zero.view(torch.int32),
        weights,
        begin,
        end,
        width,
        ASM=_asm(packed, whole),
        WHOLE=whole,
        PLANE=word,
        GROUP=INT4_GROUP,
        BLOCK=32,
    )
    return weights


def counters(outputs: int, device: torch.device | str) -> torch.Tensor:
    """What `multiply` counts its programs with: zeros before and after, for one product at a time."""
    return torch.zeros(triton.cdiv(outputs, _NARROW) * (_MOST // ROWS), dtype=torch.int32, device=device)


@torch.library.custom_op("autotune::int4_product", mutates_args=())
def product(
    rows: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, counters: torch.Tensor, whole: bool
) -> torch.Tensor:
    """`multiply` as one operation, which `torch.compile` need not look into."""
    return multiply(rows, packed, scale_zero, counters, whole)


@product.register_fake
def _(
    rows: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, counters: torch.Tensor, whole: bool
) -> torch.Tensor:
    return rows.new_empty((len(rows), packed.shape[1]))


def multiply(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scale_zero: torch.Tensor,
    counters: torch.Tensor,
    whole: bool = False,
    tiles: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """bfloat16 rows [tokens, inputs] times the packed weights, [tokens, outputs]; up to 128 tokens.

    `tiles` are a program's outputs, the programs that share the inputs, warps and pipeline stages.
    """
    blocks, width, word = packed.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count = len(rows)
    outputs, shares, warps, stages = tiles or _tiles(width, blocks, count)
    tokens = 8 if count <= 8 else ROWS
    output = rows.new_empty((count, width))
    partial = output if shares == 1 else torch.empty((shares, count, width), dtype=torch.float32, device=rows.device)
    _multiply[(triton.cdiv(count, tokens), triton.cdiv(width, outputs), shares)](
        rows,
        packed,
        scale_zero.view(torch.int32),
        partial,
        counters,
        output,
        count,
        width,
        blocks,
        rows.stride(0),
        ASM=_asm(rows, whole),
        WHOLE=whole,
        OUTPUTS=outputs,
        TOKENS=tokens,
        PLANE=word,
        GROUP=INT4_GROUP,
        SHARED=shares > 1,
        STAGES=stages,
        num_warps=warps,
    )
    return output


def _tiles(width: int, blocks: int, tokens: int) -> tuple[int, int, int, int]:
    """A program's outputs, the programs that share the inputs, warps and stages: what was fastest on an H200."""
    if width >= 256 * 64:
        return 64, 1, 2, 3
    outputs, warps, stages, programs = (32, 1, 4, 384) if tokens > 8 else (64, 4, 3, 256)
    if blocks >= 48 and tokens <= 8:
        outputs = 128
    shares = 1
    while shares * triton.cdiv(width, outputs) < programs and 4 * shares <= blocks:
        shares *= 2
    return outputs, shares, warps, stages


def _asm(tensor: torch.Tensor, whole: bool) -> tuple[str, ...] | None:
    """For each plane, what makes two weights of two words, a scale and a zero; None for Triton's interpreter."""
    if not tensor.is_cuda:
        return None
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
