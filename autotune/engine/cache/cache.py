"""The caches by their words, and what is asked of all layers of one: appending, rolling back, coming back to a state.

`dynamic`, `sliding` and `offloaded` are transformers' own. `static` and `quantized-*` are preallocated here, so that
the footprint does not creep. A quantized cache stores a group of tokens when it can no longer be rolled back: `room`
says how many tokens fit before that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from ..support import Unsupported
from .layers import Lengths, StaticLayer, indexed
from .quantized import Float8Layer, QuantizedLayer
from .state import StateCopy, StateLayer, hybrid

# transformers' words for layers: what keeps keys and values only, or with an index; a state, both, and neither
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_INDEXED = {"indexed_attention"}
_STATE = {"linear_attention", "conv"}
_HYBRID = {"hybrid", "hybrid_sliding"}
_NOTHING = {"dummy"}


@contextmanager
def lengths_on_device(cache: Cache, lengths: Lengths) -> Iterator[None]:
    """While it holds, the layers append where `lengths` says, and their own lengths stand still (see `advance`)."""
    for layer in layers_of(cache):
        layer.lengths = lengths
    try:
        yield
    finally:
        for layer in layers_of(cache):
            layer.lengths = None


def make_cache(word: str, config: Any, capacity: int, device: str, spare: int = 0) -> Cache:
    """An empty cache for one request of at most `capacity` tokens. Raises Unsupported.

    `spare` more slots may be written behind the newest token by recorded steps that are longer than what they add.
    """
    text = config.get_text_config(decoder=True)
    if word == "sliding" and not _has_sliding_layers(text):
        raise Unsupported(f"{text.model_type} has no sliding-window layers: cache = sliding does not apply")
    if word == "offloaded" and device == "cpu":
        raise Unsupported("cache = offloaded moves the cache from a GPU to host memory: there is no GPU here")
    if set(getattr(text, "layer_types", None) or ()) - _ATTENTION:
        cache = Cache(layers=_layers(word, text, capacity, spare), offloading=word == "offloaded")
    elif word in ("dynamic", "offloaded"):
        # Without the config every layer keeps all tokens; models with a window mask what they must not see.
        cache = DynamicCache(offloading=word == "offloaded")
    elif word == "sliding":
        cache = DynamicCache(config=text)
    else:
        kind, *sizes = _fixed(word, capacity, spare)
        cache = Cache(layers=[kind(*sizes) for _ in range(int(text.num_hidden_layers))])
    if word == "sliding":
        for layer in cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()
    return cache


def seen_by_all(config: Any) -> int:
    """The most tokens among which layers with an index choose none: of so many, each attends to all before it.

    Among more, scores that are equal, or differ by rounding, are chosen from as the pass has it: several tokens at once
    otherwise than one by one, after a prefix otherwise than with it.
    """
    text = config.get_text_config(decoder=True)
    if not _INDEXED & set(getattr(text, "layer_types", None) or ()):
        return 2**31
    return int(getattr(text, "index_topk", None) or getattr(text, "indexer_budget", None) or 0)


def _fixed(word: str, capacity: int, spare: int) -> tuple[Any, ...]:
    """The class of an attention layer of fixed memory, and what it is made with."""
    match word:
        case "static":
            return StaticLayer, capacity, spare
        case "quantized-8" | "quantized-4" | "quantized-2":
            return QuantizedLayer, capacity, int(word[-1]), spare
        case "quantized-fp8":
            return Float8Layer, capacity, spare
    raise Unsupported(f"unknown cache {word}")


def _layers(word: str, text: Any, capacity: int, spare: int) -> list[Any]:
    """A layer for each of a model's that has some which keep a state, an index, or nothing."""
    kinds, given = get_layer_types_and_kwargs(text)
    if word == "sliding" and "hybrid_sliding" in kinds:
        raise Unsupported(f"{text.model_type} has layers with a window and a state: cache = sliding does not apply")
    unknown = set(kinds) - _ATTENTION - _INDEXED - _STATE - _HYBRID - _NOTHING
    if unknown:
        raise Unsupported(f"{text.model_type} has {min(unknown)} layers, whose cache is not known")
    layers: list[Any] = []
    for kind, words in zip(kinds, given, strict=True):
        made: tuple[Any, ...] = (DynamicLayer,)
        if word == "sliding" and "sliding_window" in words:
            made = (DynamicSlidingWindowLayer, words["sliding_window"])
        elif word not in ("dynamic", "offloaded", "sliding"):
            made = _fixed(word, capacity, spare)
        states = words.get("number_of_states", 1)
        if kind in _NOTHING:
            layers.append(DummyLayer())
        elif kind in _STATE:
            layers.append(StateLayer(states))
        elif kind in _INDEXED:
            layers.append(DynamicIndexedLayer() if made[0] is DynamicLayer else indexed(made[0])(*made[1:]))
        elif kind in _HYBRID:
            layers.append(hybrid(made[0])(states, *made[1:]))
        else:
            layers.append(made[0](*made[1:]))
    return layers


def layers_of(cache: Cache) -> list[Any]:
    """Those with keys and values, which transformers types by a mixin that lacks most of their methods."""
    return [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]


def states_of(cache: Cache) -> list[StateLayer]:
    """The layers that keep a state."""
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]


def copy_states(cache: Cache, into: list[StateCopy] | None = None) -> list[StateCopy]:
    """The states to go back to, since nothing else takes back what they were fed; in the memory of earlier copies."""
    states = states_of(cache)
    before: list[StateCopy | None] = [*into] if into else [None] * len(states)
    return [layer.copy(copied) for layer, copied in zip(states, before, strict=True)]


def go_back_to(cache: Cache, copies: list[StateCopy]) -> None:
    for layer, copied in zip(states_of(cache), copies, strict=True):
        layer.go_back_to(copied)


def room(cache: Cache) -> int:
    """How many tokens may be appended, and still be rolled back, before the cache must `settle`."""
    return min((layer.room() for layer in layers_of(cache) if isinstance(layer, QuantizedLayer)), default=2**31)


def settle(cache: Cache) -> None:
    """All tokens so far are final: quantize the groups that have left the full-precision window."""
    for layer in layers_of(cache):
        if isinstance(layer, QuantizedLayer):
            layer.settle()
        elif getattr(layer, "record_past", False):
            layer.crop(0)  # sliding layers drop what has left their window


def advance(cache: Cache, tokens: int) -> None:
    """A recorded step has appended `tokens` tokens."""
    for layer in layers_of(cache):
        layer.advance(tokens)


def restart(cache: Cache) -> None:
    """Forget every token, and keep the memory."""
    for layer in dict.fromkeys([*layers_of(cache), *states_of(cache)]):
        layer.restart()


def stored_tokens(cache: Cache) -> int:
    """How many tokens are in quantized groups."""
    return next((layer.stored for layer in layers_of(cache) if isinstance(layer, QuantizedLayer)), 0)


def rollback(cache: Cache, tokens: int) -> None:
    """Forget the newest `tokens` tokens, but for what states have seen of them (`go_back_to`)."""
    if tokens > 0:
        for layer in layers_of(cache):
            if layer.is_initialized:  # layers that share another's keys and values hold nothing
                layer.crop(-tokens)


@dataclass(frozen=True)
class Mark:
    """A cache on the way through a prompt: its `tokens`, and copies of what appending changes for good.

    That is each quantized layer's full-precision window and each state. What was stored in groups by then stays as it
    is, whatever follows. What follows is rounded differently when it is decoded and when it is prefilled, so that after
    whole prefill chunks a mark is the only state of a quantized cache that a fresh start is sure to pass through.
    """

    tokens: int
    chunk: int
    windows: list[tuple[torch.Tensor, torch.Tensor] | None]
    states: list[StateCopy]


def mark(cache: Cache, tokens: int, chunk: int) -> Mark | None:
    """The state after `tokens` tokens, to come back to; None for a cache that can drop its newest tokens."""
    if not quantized(cache) and not states_of(cache):
        return None
    windows = [layer.window() for layer in layers_of(cache)] if quantized(cache) else []
    return Mark(tokens, chunk, windows, copy_states(cache))


def resume(cache: Cache, tokens: int, held: int, chunk: int, marked: Mark | None) -> int:
    """Go back to the longest state within the first `tokens` of the `held` tokens that a fresh start would reach.

    Returns how many tokens the cache then holds; at 0 it is to be restarted.
    """
    if tokens <= 0 or any(getattr(layer, "record_past", False) for layer in layers_of(cache)):
        return 0  # layers with a window have dropped what lies before it
    if not quantized(cache) and not states_of(cache):
        rollback(cache, held - tokens)
        return tokens
    if not quantized(cache) and tokens == held:
        return tokens  # the prompt goes on from all that the states have seen
    if marked is None or marked.tokens > tokens or (quantized(cache) and marked.chunk != chunk):
        return 0
    if not quantized(cache):
        rollback(cache, held - marked.tokens)
    for layer, window in zip(layers_of(cache), marked.windows, strict=quantized(cache)):
        if window is not None:
            layer.go_back(marked.tokens, *window)
    go_back_to(cache, marked.states)
    return marked.tokens


def quantized(cache: Cache) -> bool:
    return any(isinstance(layer, QuantizedLayer) for layer in cache.layers)


def stored_bytes(cache: Cache) -> int:
    """What the cache holds on its device now, in bytes."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    held += [value for several in held if isinstance(several, dict) for value in several.values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, torch.Tensor))


def _has_sliding_layers(text: Any) -> bool:
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(text, "sliding_window", None))
