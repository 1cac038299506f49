"""A product of a few tokens with 4-bit weights, whose time is that of reading the weights once.

A weight is (16 + code) * scale + zero, rounded once to bfloat16, with a scale and a zero for a group of 128 weights
along the input, or of 64 where 128 do not divide it; or, where somebody else chose the codes, exactly
(16 + code + zero) * scale, with a whole zero. 16 + code is a bfloat16 number whose mantissa holds the code's bits: a
shift and a mask make two of them, a multiply-add two weights.
Nothing has to move between threads for that, since the weights are packed to suit: a 16-bit word holds the codes of one
output at four inputs that lie PLANE apart, and so each of its four planes goes into a tensor core's product of its own.

Where a layer has too few outputs to fill the GPU, its inputs are shared out too: each program writes its part of the
sum, and the last to arrive adds the parts in their order, so that the result does not depend on who that is.
"""

from __future__ import annotations

import torch

ROWS = 16  # tokens that one program multiplies at most: chosen, not measured; up to 8 it multiplies 8
_NARROW = 32  # the fewest outputs of a program, as `_tiles` has them
_MOST = 128  # tokens of one call: from there on weights are unpacked (linear.MANY)


def plane(columns: int) -> int:
    """How far apart along the input the four codes of a word are."""
    return 64 if columns % 256 == 0 else 32 if columns % 128 == 0 else 16


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
    numbers = (codes + 16).float().unflatten(1, (len(scale_zero), -1))
    weights = (numbers + zero) * scale if whole else torch.addcmul(zero, numbers, scale)
    return weights.flatten(1).bfloat16()


def unpack(packed: torch.Tensor, scale_zero: torch.Tensor, begin: int, end: int, whole: bool = False) -> torch.Tensor:
    """The weights of the outputs from `begin` to `end`, as `unpack_slowly` gives them."""
    from . import kernels

    blocks, width, word = packed.shape
    weights = torch.empty((end - begin, blocks * 4 * word), dtype=torch.bfloat16, device=packed.device)
    kernels.unpack[(-(-(end - begin) // 32), blocks)](
        packed,
        scale_zero.view(torch.int32),
        weights,
        begin,
        end,
        width,
        ASM=kernels.weight_assembly(whole) if packed.is_cuda else None,
        WHOLE=whole,
        PLANE=word,
        GROUP=blocks * 4 * word // len(scale_zero),
        BLOCK=32,
    )
    return weights


def counters(outputs: int, device: torch.device | str) -> torch.Tensor:
    """What `multiply` counts its programs with: zeros before and after, for one product at a time."""
    return torch.zeros(-(-outputs // _NARROW) * (_MOST // ROWS), dtype=torch.int32, device=device)


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
    from . import kernels

    blocks, width, word = packed.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count = len(rows)
    outputs, shares, warps, stages = tiles or _tiles(width, blocks, count)
    tokens = 8 if count <= 8 else ROWS
    output = rows.new_empty((count, width))
    partial = output if shares == 1 else torch.empty((shares, count, width), dtype=torch.float32, device=rows.device)
    kernels.multiply[(-(-count // tokens), -(-width // outputs), shares)](
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
        ASM=kernels.weight_assembly(whole) if rows.is_cuda else None,
        WHOLE=whole,
        OUTPUTS=outputs,
        TOKENS=tokens,
        PLANE=word,
        GROUP=blocks * 4 * word // len(scale_zero),
        SHARED=shares > 1,
        STAGES=stages,
        num_warps=warps,
    )
    return output


def _tiles(width: int, blocks: int, tokens: int) -> tuple[int, int, int, int]:
    """A program's outputs, the programs that share the inputs, warps and stages.

    A rule for what was fastest on an H200, shape by shape (benchmarks/recorded/int4-speed-h200.txt and a second run).
    """
    if width >= 256 * 64:
        return 64, 1, 2, 3
    outputs, warps, stages, programs = (32, 1, 4, 384) if tokens > 8 else (64, 4, 3, 256)
    if blocks >= 48 and tokens <= 8:
        outputs = 128
    shares = 1
    while shares * -(-width // outputs) < programs and 4 * shares <= blocks:
        shares *= 2
    return outputs, shares, warps, stages
