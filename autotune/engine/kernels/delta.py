# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""A decode step of a gated delta net (Yang et al., arXiv 2412.06464) between its projections, in three launches.

PyTorch's operations take some fifty, of which ten go through the whole state, 2 MiB a layer of a 9B. Here each program
holds its part of a head's state in registers while it reads the few new tokens. All compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FEW = 16  # new tokens at most: more are a prompt's, which are computed in chunks. Chosen, not measured
BLOCK = 32  # columns of a head's state that a program holds: 128 programs for a 9B's 32 heads. Chosen, not measured
EPSILON = 1e-6  # beside the squares of a query's or key's length, as transformers has it


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """Read n new tokens into `state` [1, heads, key_dim, value_dim] (float32), in place; what each then reads from it.

    Queries and keys [1, n, key_heads, key_dim] are made unit vectors; `value` is [1, n, heads, value_dim], `beta` and
    the logarithm of the decay `g` are [1, n, heads]. Returns [1, n, heads, value_dim] in the queries' type.
    """
    _, count, heads, width = value.shape
    key_heads, dim = key.shape[2:]
    output = torch.empty((1, count, heads, width), dtype=query.dtype, device=query.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _delta_rule[(heads, triton.cdiv(width, block))](
        query,
        key,
        value,
        g,
        beta,
        state,
        output,
        *query.stride()[1:],
        *key.stride()[1:],
        *value.stride()[1:],
        *g.stride()[1:],
        *beta.stride()[1:],
        dim**-0.5,
        EPSILON,
        COUNT=count,
        HEADS=heads,
        GROUP=heads // key_heads,
        DIM=dim,
        WIDTH=width,
        PADDED=triton.next_power_of_2(dim),
        BLOCK=block,
    )
    return output


def convolve(inputs: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A causal depthwise convolution's next output, [1, channels, 1], through SiLU; `state` takes the new input.

    `inputs` is [1, channels, 1], `weight` [channels, kernel], `state` [1, channels, kernel], its newest input last.
    """
    channels, kernel = weight.shape
    output = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    _convolve[(triton.cdiv(channels, 128),)](
        inputs,
        state,
        weight,
        weight if bias is None else bias,
        output,
        inputs.stride(1),
        channels,
        KERNEL=kernel,
        BIAS=bias is not None,
        BLOCK=128,
        num_warps=4,
    )
    return output


def normalize_gated(states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square norm of each row of `states` [rows, width] times weight, times SiLU of the row of `gate`."""
    states, gate = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (states, gate))
    result = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    width = states.shape[1]
    _normalize_gated[(len(states),)](
        states,
        gate,
        weight,
        result,
        states.stride(0),
        gate.stride(0),
        epsilon,
        width,
        PADDED=triton.next_power_of_2(width),
        num_warps=1,
    )
    return result


@triton.jit
def _delta_rule(
    query,
    key,
    value,
    g,
    beta,
    state,
    output,
    query_token,
    query_head,
    query_channel,
    key_token,
    key_head,
    key_channel,
    value_token,
    value_head,
    value_channel,
    g_token,
    g_head,
    beta_token,
    beta_head,
    scale,
    epsilon,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, part = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, PADDED), part * BLOCK + tl.arange(0, BLOCK)
    inside, within = row < DIM, column < WIDTH
    place = state + (head * DIM + row[:, None]) * WIDTH + column[None, :]
    mask = inside[:, None] & within[None, :]
    held = tl.load(place, mask=mask, other=0)
    for token in range(COUNT):
        source = token * query_token + head // GROUP * query_head + row * query_channel
        asked = tl.load(query + source, mask=inside, other=0).to(tl.float32)
        source = token * key_token + head // GROUP * key_head + row * key_channel
        at = tl.load(key + source, mask=inside, other=0).to(tl.float32)
        source = token * value_token + head * value_head + column * value_channel
        new = tl.load(value + source, mask=within, other=0).to(tl.float32)
        asked *= tl.rsqrt(tl.sum(asked * asked) + epsilon) * scale
        at *= tl.rsqrt(tl.sum(at * at) + epsilon)
        held *= tl.exp(tl.load(g + token * g_token + head * g_head).to(tl.float32))
        change = new - tl.sum(held * at[:, None], axis=0)
        change *= tl.load(beta + token * beta_token + head * beta_head).to(tl.float32)
        held += at[:, None] * change[None, :]
        read = tl.sum(held * asked[:, None], axis=0)
        tl.store(output + (token * HEADS + head) * WIDTH + column, read.to(output.dtype.element_ty), mask=within)
    tl.store(place, held, mask=mask)


@triton.jit
def _convolve(
    inputs,
    state,
    weight,
    bias,
    output,
    input_channel,
    channels,
    KERNEL: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    new = tl.load(inputs + channel * input_channel, mask=inside, other=0)
    total = new.to(tl.float32) * tl.load(weight + channel * KERNEL + KERNEL - 1, mask=inside, other=0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    for tap in tl.static_range(KERNEL - 1):
        earlier = tl.load(state + channel * KERNEL + tap + 1, mask=inside, other=0)
        total += earlier.to(tl.float32) * tl.load(weight + channel * KERNEL + tap, mask=inside, other=0).to(tl.float32)
        tl.store(state + channel * KERNEL + tap, earlier, mask=inside)
    tl.store(state + channel * KERNEL + KERNEL - 1, new, mask=inside)
    total = total * tl.sigmoid(total)
    tl.store(output + channel, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _normalize_gated(states, gate, weight, result, states_row, gate_row, epsilon, width, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    inside = channel < width
    state = tl.load(states + row * states_row + channel, mask=inside, other=0).to(tl.float32)
    opened = tl.load(gate + row * gate_row + channel, mask=inside, other=0).to(tl.float32)
    factor = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    state = state * tl.rsqrt(tl.sum(state * state) / width + epsilon) * factor * opened * tl.sigmoid(opened)
    tl.store(result + row * width + channel, state.to(result.dtype.element_ty), mask=inside)
