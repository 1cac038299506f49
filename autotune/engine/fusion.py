"""What a recorded step computes with fewer kernels than the model's own code does.

That is its norms, its rotary embeddings, and what a gated delta net does between its projections. Nothing is known of a
model but what is tried: a norm is replaced where ours gives the same, a rotary embedding where turning halves does, and
so on. The rest stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# transformers' names in the files of models that have them
ROTARY = "apply_rotary_pos_emb"
DELTA_RULES = ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule")  # for one token, and for several
CONVOLUTION = "causal_conv1d_update"
_RULE = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}  # as models ask for the delta rule
_CLOSE = 2e-2  # of the largest value, for a unit normal in bfloat16: about five of its steps; chosen, not measured


class Fusion:
    """One model's replacements, in place while `applied()` holds."""

    def __init__(self, model: nn.Module) -> None:
        kinds: dict[type, Callable[..., torch.Tensor] | None] = {}
        self.norms: list[tuple[nn.Module, Callable[..., torch.Tensor]]] = []
        self.functions: list[tuple[ModuleType, str, Callable[..., Any], Callable[..., Any]]] = []
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith(("RMSNorm", "RMSNormGated")) and "forward" not in vars(module):
                if kind not in kinds:
                    kinds[kind] = _like(module)
                ours = kinds[kind]
                if ours is not None:
                    self.norms.append((module, partial(ours, module)))
        if any(parameter.is_cuda for parameter in model.parameters()):
            for name in {type(module).__module__ for module in model.modules()}:
                self._add_functions(sys.modules[name])

    def _add_functions(self, file: ModuleType) -> None:
        """Those of a model's file that ours can stand for."""
        known: dict[str, tuple[Callable[..., bool], Callable[..., Any]]] = {
            ROTARY: (rotates_halves, _rotate),
            CONVOLUTION: (convolves, _convolve),
            **dict.fromkeys(DELTA_RULES, (is_delta_rule, _delta_rule)),
        }
        for name, (fits, ours) in known.items():
            theirs = getattr(file, name, None)
            if theirs is not None and fits(theirs):
                self.functions.append((file, name, theirs, partial(ours, theirs)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        for norm, forward in self.norms:
            norm.forward = forward
        for file, name, _, ours in self.functions:
            setattr(file, name, ours)
        try:
            yield
        finally:
            for norm, _ in self.norms:
                del norm.forward
            for file, name, theirs, _ in self.functions:
                setattr(file, name, theirs)


def _epsilon(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm(norm: nn.Module, offset: float, states: torch.Tensor) -> torch.Tensor:
    assert isinstance(norm.weight, torch.Tensor)
    if not states.is_cuda:
        return functional.rms_norm(states, norm.weight.shape, norm.weight + offset, _epsilon(norm))
    from .kernels import normalize

    return normalize(states, norm.weight, offset, _epsilon(norm))


def _gated_norm(norm: nn.Module, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    assert isinstance(norm.weight, torch.Tensor)
    if not states.is_cuda or states.ndim != 2:
        normed = functional.rms_norm(states.float(), norm.weight.shape, norm.weight.float(), _epsilon(norm))
        return (normed * functional.silu(gate.float())).to(states.dtype)
    from .kernels import normalize_gated

    return normalize_gated(states, gate, norm.weight, _epsilon(norm))


@torch.inference_mode()
def _like(norm: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Ours that computes the same; it takes the module first. None for a norm that is not a root mean square's."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or _epsilon(norm) is None:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn((4, len(weight)), generator=generator).to(weight) for _ in range(2)]
    if type(norm).__name__.endswith("Gated"):
        candidates: list[Callable[..., torch.Tensor]] = [_gated_norm]
    else:  # some add 1 to their weight (Gemma's)
        candidates, inputs = [lambda norm, states, by=by: _norm(norm, by, states) for by in (0.0, 1.0)], inputs[:1]
    try:
        expected = norm(*inputs)
    except TypeError:  # it takes something else as well
        return None
    close = _CLOSE * expected.abs().max()
    return next((ours for ours in candidates if (ours(norm, *inputs) - expected).abs().max() <= close), None)


def rotates_halves(rotary: Callable[..., Any]) -> bool:
    """Whether the function is x * cos + (-second half, first half) * sin for queries and keys."""
    query, key, cos, sin = torch.randn((4, 1, 2, 3, 8), generator=torch.Generator().manual_seed(0))
    cos, sin = cos[:, 0], sin[:, 0]
    try:
        results = rotary(query, key, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(
        isinstance(result, torch.Tensor)
        and torch.allclose(result, states * cos[:, None] + half_turned(states) * sin[:, None], atol=1e-5)
        for result, states in zip(results, (query, key), strict=False)
    )


def half_turned(states: torch.Tensor) -> torch.Tensor:
    """(-second half, first half) of the last dimension."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotate(
    rotary: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    dense = all(states.stride(-1) == 1 for states in (query, key, cos, sin))
    if args or kwargs or not dense or query.ndim != 4 or len(query) != 1 or cos.shape[-1] != query.shape[-1]:
        return rotary(query, key, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
    from .kernels import rotate

    return rotate(query, key, cos, sin)


@functools.cache
def is_delta_rule(rule: Callable[..., Any]) -> bool:
    """Whether the function is the gated delta rule, one token after the other, with unit queries and keys."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn((2, 1, 3, 2, 8), generator=generator)
    value = torch.randn((1, 3, 4, 8), generator=generator)
    g, beta = -torch.rand((1, 3, 4), generator=generator), torch.rand((1, 3, 4), generator=generator)
    state = torch.randn((1, 4, 8, 8), generator=generator)
    try:
        output, after = rule(query, key, value, g=g, beta=beta, initial_state=state.clone(), **_RULE)
    except (TypeError, RuntimeError, ValueError, AssertionError):  # as kernels do that take no tensors of a CPU
        return False
    query, key = (functional.normalize(each, dim=-1).repeat_interleave(2, 2) for each in (query, key))
    expected = []
    for token in range(3):
        state = state * g[:, token].exp()[..., None, None]
        change = (value[:, token] - torch.einsum("bhkv,bhk->bhv", state, key[:, token])) * beta[:, token, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, token], change)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, query[:, token]) * 8**-0.5)
    return torch.allclose(output, torch.stack(expected, 1), atol=1e-4) and torch.allclose(after, state, atol=1e-4)


def _delta_rule(
    rule: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .kernels import FEW, delta_rule

    asked = all(kwargs.get(name) == value for name, value in _RULE.items())
    known = initial_state is not None and initial_state.is_contiguous() and initial_state.dtype == torch.float32
    if not known or not asked or len(query) > 1 or query.shape[1] > FEW or kwargs.get("cu_seqlens") is not None:
        return rule(query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs)  # type: ignore[no-any-return]
    assert initial_state is not None
    return delta_rule(query, key, value, g, beta, initial_state), initial_state


@functools.cache
def convolves(update: Callable[..., Any]) -> bool:
    """Whether the function is a causal convolution of one more input through SiLU, which its state then holds."""
    generator = torch.Generator().manual_seed(0)
    inputs, state, weight = (torch.randn(shape, generator=generator) for shape in ((1, 6, 1), (1, 6, 4), (6, 4)))
    before = state.clone()
    try:
        output = update(inputs, state, weight, None, "silu")
    except (TypeError, RuntimeError, ValueError, AssertionError):
        return False
    window = torch.cat([before, inputs], dim=-1)[..., 1:]
    expected = functional.silu((window * weight).sum(-1, keepdim=True))
    return torch.allclose(output, expected, atol=1e-5) and torch.equal(state, window)


def _convolve(
    update: Callable[..., Any],
    inputs: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    alike = state.is_contiguous() and weight.is_contiguous() and state.shape[2] == weight.shape[1]
    if activation != "silu" or len(inputs) > 1 or inputs.shape[2] > 1 or not alike:
        return update(inputs, state, weight, bias, activation)  # type: ignore[no-any-return]
    from .kernels import convolve

    return convolve(inputs, state, weight, bias)  # type: ignore[no-any-return]
