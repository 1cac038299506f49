"""Layers that remember by a state instead of keys and values: gated delta nets, Mamba, short convolutions.

A state has the size of one token, whatever it has seen, and cannot forget: what was fed is taken back by going back to
a copy. Hybrid layers hold a state beside keys and values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


@dataclass(frozen=True)
class StateCopy:
    """A layer's states as they were: the tensors by name and number, and which of them had seen anything."""

    tensors: dict[tuple[str, int], torch.Tensor]
    seen: dict[int, bool]


class StateLayer(LinearAttentionLayer):
    """transformers' own, which updates its tensors in place; they can be copied and gone back to."""

    def _tensors(self) -> dict[tuple[str, int], torch.Tensor]:
        kinds = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        return {(kind, n): held for kind, states in kinds.items() for n, held in states.items() if held is not None}

    def copy(self, into: StateCopy | None = None) -> StateCopy:
        """The states now; in the memory of an earlier copy where there is one of the same tensors."""
        tensors = self._tensors()
        if into is not None and into.tensors.keys() == tensors.keys():
            for name, tensor in tensors.items():
                into.tensors[name].copy_(tensor)
            return StateCopy(into.tensors, dict(self.has_previous_state))
        return StateCopy({name: tensor.clone() for name, tensor in tensors.items()}, dict(self.has_previous_state))

    def go_back_to(self, copied: StateCopy) -> None:
        """In place, since recorded steps know the tensors by their addresses."""
        for name, tensor in self._tensors().items():
            if name in copied.tensors:
                tensor.copy_(copied.tensors[name])
            else:
                tensor.zero_()
        self.has_previous_state = dict(copied.seen)

    def restart(self) -> None:
        LinearAttentionLayer.reset(self)


@functools.cache
def hybrid(kind: type[CacheLayerMixin]) -> type[StateLayer]:
    """Layers that hold a state beside keys and values of this kind."""

    class Hybrid(StateLayer, kind):  # type: ignore[misc, valid-type]
        is_compileable = kind.is_compileable

        def __init__(self, states: int, *sizes: Any) -> None:
            kind.__init__(self, *sizes)
            LinearAttentionLayer.__init__(self, states)

        def lazy_initialization(  # type: ignore[override] # as transformers' own hybrids do
            self, *keys_and_values: torch.Tensor, **states: Any
        ) -> None:
            """transformers gives keys and values by place, states by name."""
            if keys_and_values:
                kind.lazy_initialization(self, *keys_and_values)
            else:
                LinearAttentionLayer.lazy_initialization(self, **states)

        def crop(self, tokens_to_remove: int) -> None:
            kind.crop(self, tokens_to_remove)  # type: ignore[attr-defined] # the state goes back to a copy

        def get_max_length(self) -> int:
            return kind.get_max_length(self)

        def restart(self) -> None:
            StateLayer.restart(self)
            kind.restart(self)  # type: ignore[attr-defined]

    return Hybrid
