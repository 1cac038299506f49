# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Small kernels that stand for many: each does in one launch what PyTorch's operations do in three to ten.

In a recorded step of one token every kernel takes about two microseconds however little it does, so that a layer's
forty cost more time than its weights take to read. They compute in float32 and round once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def normalize(states: torch.Tensor, weight: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) of the last dimension, times weight + offset."""
    rows = states.reshape(-1, states.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    width = rows.shape[1]
    padded = triton.next_power_of_2(width)
    _normalize[(len(rows),)](
        rows,
        weight,
        result,
        rows.stride(0),
        epsilon,
        offset,
        width,
        PADDED=padded,
        num_warps=min(16, max(1, padded // 256)),
    )
    return result.view(states.shape)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated, of [1, heads, n, head_dim].

    `cos` and `sin` are [1, n, head_dim]. The results lie in memory as [1, n, heads, head_dim].
    """
    _, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    rotated = query.new_empty((1, count, heads + kv_heads, dim)).transpose(1, 2)
    _rotate[(count, heads + kv_heads)](
        query,
        key,
        cos,
        sin,
        rotated,
        *query.stride()[1:3],
        *key.stride()[1:3],
        cos.stride(1),
        sin.stride(1),
        *rotated.stride()[1:3],
        HEADS=heads,
        DIM=dim,
        PADDED=triton.next_power_of_2(dim),
    )
    return rotated[:, :heads], rotated[:, heads:]


@triton.jit
def _normalize(states, weight, result, stride, epsilon, offset, width, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    inside = channel < width
    state = tl.load(states + row * stride + channel, mask=inside, other=0).to(tl.float32)
    factor = tl.load(weight + channel, mask=inside, other=0).to(tl.float32) + offset
    scale = tl.rsqrt(tl.sum(state * state) / width + epsilon)
    tl.store(result + row * width + channel, (state * scale * factor).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    rotated,
    query_head,
    query_token,
    key_head,
    key_token,
    cos_token,
    sin_token,
    out_head,
    out_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    inside = channel < DIM
    other = (channel + DIM // 2) % DIM
    sign = tl.where(channel < DIM // 2, -1.0, 1.0)
    if head < HEADS:
        source = query + head * query_head + token * query_token
    else:
        source = key + (head - HEADS) * key_head + token * key_token
    here = tl.load(source + channel, mask=inside, other=0).to(tl.float32)
    there = tl.load(source + other, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + token * cos_token + channel, mask=inside, other=0).to(tl.float32)
    s = tl.load(sin + token * sin_token + channel, mask=inside, other=0).to(tl.float32)
    result = here * c + sign * there * s
    place = rotated + head * out_head + token * out_token + channel
    tl.store(place, result.to(rotated.dtype.element_ty), mask=inside)
