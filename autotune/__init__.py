"""Run any Hugging Face model as fast as it can go inside a hard VRAM budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Budget, Workload
    from .policy.policy import Policy
    from .request import Request
    from .run import tune
    from .serve.deploy import LLM, deploy

__version__ = "0.1.0"
__all__ = ["LLM", "Budget", "Policy", "Request", "Workload", "deploy", "tune"]

_HOMES = {
    "Budget": "config",
    "LLM": "serve.deploy",
    "Policy": "policy.policy",
    "Request": "request",
    "Workload": "config",
    "deploy": "serve.deploy",
    "tune": "run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import autotune` alone starts at once and imports no torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
