"""What a recorded step computes with fewer kernels than the model's own code does: its norms and rotary embeddings.

Nothing is known of a model but what is tried: a norm is replaced where ours gives the same, a rotary embedding where
turning halves does. The rest stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

ROTARY = "apply_rotary_pos_emb"  # transformers' name in every model's file
_CLOSE = 2e-2  # of the largest value, for a unit normal in bfloat16: about five of its steps; chosen, not measured


class Fusion:
    """One model's replacements, in place while `applied()` holds."""

    def __init__(self, model: nn.Module) -> None:
        kinds: dict[type, float | None] = {}
        self.norms: list[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = []
        self.files: list[tuple[ModuleType, Any]] = []
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith("RMSNorm") and "forward" not in vars(module):
                if kind not in kinds:
                    kinds[kind] = _offset(module)
                offset = kinds[kind]
                if offset is not None:
                    self.norms.append((module, partial(_norm, module, offset)))
        if any(parameter.is_cuda for parameter in model.parameters()):
            for name in {type(module).__module__ for module in model.modules()}:
                rotary = getattr(sys.modules[name], ROTARY, None)
                if rotary is not None and rotates_halves(rotary):
                    self.files.append((sys.modules[name], rotary))

    @contextmanager
    def applied(self) -> Iterator[None]:
        for norm, forward in self.norms:
            norm.forward = forward
        for file, rotary in self.files:
            setattr(file, ROTARY, partial(_rotate, rotary))
        try:
            yield
        finally:
            for norm, _ in self.norms:
                del norm.forward
            for file, rotary in self.files:
                setattr(file, ROTARY, rotary)


def _epsilon(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm(norm: nn.Module, offset: float, states: torch.Tensor) -> torch.Tensor:
    assert isinstance(norm.weight, torch.Tensor)
    if not states.is_cuda:
        return functional.rms_norm(states, norm.weight.shape, norm.weight + offset, _epsilon(norm))
    from .kernels import normalize

    return normalize(states, norm.weight, offset, _epsilon(norm))


@torch.inference_mode()
def _offset(norm: nn.Module) -> float | None:
    """What the norm adds to its weight (Gemma's: 1), or None where it is no root mean square norm like PyTorch's."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or _epsilon(norm) is None:
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((4, len(weight)), generator=generator).to(weight)
    expected = norm(states)
    for offset in (0.0, 1.0):
        error = (_norm(norm, offset, states) - expected).abs().max()
        if error <= _CLOSE * expected.abs().max():
            return offset
    return None


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
