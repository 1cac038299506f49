"""Run any Hugging Face model as fast as it can go inside a hard VRAM budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy.policy import Policy, read_policy
    from .serve.deploy import deploy

__version__ = "0.1.0"
__all__ = ["Policy", "deploy", "read_policy"]

_HOMES = {"deploy": ".serve.deploy", "Policy": ".policy.policy", "read_policy": ".policy.policy"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import autotune` alone stays fast and imports no torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
