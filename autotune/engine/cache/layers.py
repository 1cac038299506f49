"""Layers of fixed memory: what they share, and the one in full precision.

The lengths of a cache are numbers of the host. A recorded step (a CUDA graph) cannot know them: while
`lengths_on_device` holds, `update` takes its slots from two tensors, and returns every slot, to be masked.

Shapes: keys and values are [1, kv_heads, tokens, head_dim]; one request at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True)
class Lengths:
    """What a recorded step must know of its cache: the `tokens` held before it and, of them, those `stored` in groups.

    Both are int64 tensors [1]. Without `read`, `update` returns only the new keys and values: the attention reads the
    layer itself.
    """

    tokens: torch.Tensor
    stored: torch.Tensor
    read: bool


class Preallocated(CacheLayerMixin):
    """What layers with fixed memory have in common: their lengths can be the host's or a recorded step's."""

    is_sliding = False
    capacity: int

    def __init__(self, spare: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # transformers' base class is untyped
        self.spare = spare
        self.lengths: Lengths | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override] # transformers' word for: always needs a mask
        return self.lengths is not None

    def tokens(self) -> int:
        raise NotImplementedError

    def slots(self) -> int:
        """How many keys `update` returns during a recorded step."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        # During a recorded step transformers takes positions and masks from a tensor, as from its own StaticLayer.
        return self.tokens() if self.lengths is None else self.lengths.tokens  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.tokens() + query_length if self.lengths is None else self.slots()), 0

    def get_max_length(self) -> int:
        return self.capacity

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: torch.Tensor, stored: torch.Tensor | None
    ) -> None:
        """Write a recorded step's keys and values behind the `tokens` held, of which `stored` are elsewhere."""
        assert self.keys is not None
        assert self.values is not None
        if tokens.is_cuda and not torch.compiler.is_compiling():
            from ..kernels import append

            append(self.keys, self.values, key_states, value_states, tokens, stored)
            return
        begin = tokens if stored is None else tokens - stored
        slots = begin + torch.arange(key_states.shape[-2], device=begin.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)


class StaticLayer(Preallocated):
    """Preallocated slots in full precision. Reads return only the slots that hold something."""

    def __init__(self, capacity: int, spare: int = 0):
        super().__init__(spare)
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (1, key_states.shape[1], self.capacity + self.spare, key_states.shape[-1])
        self.keys = key_states.new_zeros(shape)  # zeros: a masked slot must not hold a NaN
        self.values = value_states.new_zeros((*shape[:-1], value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.lengths is not None:
            self._append(key_states, value_states, self.lengths.tokens, None)
            return (self.keys, self.values) if self.lengths.read else (key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens > self.length:
            raise ValueError(f"{tokens} tokens cannot be rolled back: the cache holds {self.length}")
        self.length -= tokens

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def restart(self) -> None:
        self.length = 0

    def tokens(self) -> int:
        return self.length

    def slots(self) -> int:
        return self.capacity + self.spare


@functools.cache
def indexed(kind: type[Preallocated]) -> type[Preallocated]:
    """Layers of this kind whose tokens have an index key beside theirs, by which few are chosen to be attended to.

    (DeepSeek sparse attention, DeepSeek-AI, arXiv 2512.02556.) Index keys are [1, tokens, dim], in full precision, each
    at its token's place among the keys that a recorded step is given.
    """

    class Indexed(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *sizes: Any) -> None:
            super().__init__(*sizes)
            self.indexer_keys: torch.Tensor | None = None
            self.indexer_position_ids: torch.Tensor | None = None  # [.., 1, tokens], where a model appends them
            self.indexed = 0

        def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
            new = indexer_key_states.shape[1]
            if self.indexer_keys is None:
                self.indexer_keys = indexer_key_states.new_zeros((1, self.slots(), indexer_key_states.shape[2]))
            if self.lengths is not None:
                slots = self.lengths.tokens + torch.arange(new, device=self.lengths.tokens.device)
                return self.indexer_keys.index_copy_(1, slots, indexer_key_states)
            begin, self.indexed = self.indexed, self.indexed + new
            self.indexer_keys[:, begin : self.indexed] = indexer_key_states
            return self.indexer_keys[:, : self.indexed]

        def _hold(self, tokens: int) -> None:
            self.indexed = tokens if self.indexer_keys is not None else 0
            if self.indexer_position_ids is not None:
                self.indexer_position_ids = self.indexer_position_ids[..., :tokens] if tokens else None

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            self._hold(self.tokens())

        def go_back(self, tokens: int, *window: torch.Tensor) -> None:
            super().go_back(tokens, *window)
            self._hold(tokens)

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            self._hold(self.tokens())

        def restart(self) -> None:
            super().restart()
            self._hold(0)

    return Indexed
