"""Rotary embeddings whose factors depend on the text's length: they are told it, for a pass sees its own tokens only.

`longrope` has one set of factors for texts of up to `original` tokens and one for longer ones; `dynamic` changes its
factors with every token beyond. transformers takes the length from the positions that a pass is given, so that a prompt
in chunks, or tokens that are verified together, would be rotated otherwise than the whole prompt, or one by one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

# Model types that transformers prefills anew where a text grows beyond `original`; others go on with mixed keys.
_ANEW = ("phi3", "phi4_multimodal", "phimoe")


class Rope:
    """A model's rotary embeddings, and the length of the text that they rotate for."""

    def __init__(self, model: PreTrainedModel, modules: list[Any]):
        self._modules = modules
        self.original = min(original for module in modules for original in _switches(module).values())
        self.dynamic = any("dynamic" in kind for module in modules for kind in _switches(module))
        self.anew = not self.dynamic and model.config.get_text_config(decoder=True).model_type in _ANEW
        self._last = torch.zeros(
            (), dtype=torch.int64, device=model.device
        )  # its address is what a recorded step reads
        for module in modules:
            module.forward = functools.partial(_forward, module.forward, self._last)

    def begin(self, length: int) -> None:
        """The passes that follow are of a text that has, or will have when they are done, so many tokens."""
        for module in self._modules if self.dynamic else ():
            _forget(module)
        self._last.fill_(length - 1)

    def same(self, tokens: int, begun: int) -> int:
        """How many tokens more have the factors of the `tokens` so far, where `begin` was told `begun`."""
        if self.dynamic:
            return max(0, max(self.original, begun) - tokens)
        return 2**31 if max(tokens, begun) > self.original else self.original - tokens


def rope_of(model: PreTrainedModel) -> Rope | None:
    """What tells the model's rotary embeddings the length; None where they do not ask for it."""
    if "length_rope" not in vars(model):
        modules = [module for module in model.modules() if _switches(module)]
        model.length_rope = Rope(model, modules) if modules else None  # type: ignore[assignment]
    return vars(model)["length_rope"]  # type: ignore[no-any-return]


def _switches(module: Any) -> dict[str, int]:
    """The kinds of the module whose factors depend on the length, each with the length that they begin to change at."""
    kinds = getattr(module, "rope_type", None)
    parameters = module.config.rope_parameters if kinds is not None else {}
    found = {}
    for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        if kind == "longrope":
            found[kind] = int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
        elif kind is not None and "dynamic" in kind:
            found[kind] = int(module.original_max_seq_len)
    return found


def _forward(
    forward: Any, last: torch.Tensor, x: torch.Tensor, position_ids: torch.Tensor, *rest: Any, **more: Any
) -> Any:
    """The module's own, which is shown the text's last position as well."""
    shown = torch.cat([position_ids, last.expand(*position_ids.shape[:-1], 1)], dim=-1)
    found = forward(x, shown, *rest, **more)
    return tuple(part[..., :-1, :] for part in found) if isinstance(found, tuple) else found[..., :-1, :]


def _forget(module: Any) -> None:
    """Go back to the factors that a model has before its first text."""
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, name).clone())
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
