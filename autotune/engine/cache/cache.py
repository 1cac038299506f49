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
from transformers.cache_utils import Cache

from ..support import Unsupported
from .layers import Lengths, StaticLayer
from .quantized import Float8Layer, QuantizedLayer

# transformers' words for layers that keep keys and values only
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


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
    count = int(text.num_hidden_layers)
    stateful = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    if stateful:
        raise Unsupported(f"{text.model_type} has {min(stateful)} layers: their state cannot be rolled back")
    match word:
        case "dynamic":
            # Without the config every layer keeps all tokens; models with a window mask what they must not see.
            cache: Cache = DynamicCache()
        case "sliding":
            if not _has_sliding_layers(text):
                raise Unsupported(f"{text.model_type} has no sliding-window layers: cache = sliding does not apply")
            cache = DynamicCache(config=text)
            cache.activate_past_recording()
        case "offloaded":
            if device == "cpu":
                raise Unsupported("cache = offloaded moves the cache from a GPU to host memory: there is no GPU here")
            cache = DynamicCache(offloading=True)
        case "static":
            cache = Cache(layers=[StaticLayer(capacity, spare) for _ in range(count)])
        case "quantized-8" | "quantized-4" | "quantized-2":
            cache = Cache(layers=[QuantizedLayer(capacity, int(word[-1]), spare) for _ in range(count)])
        case "quantized-fp8":
            cache = Cache(layers=[Float8Layer(capacity, spare) for _ in range(count)])
        case _:
            raise Unsupported(f"unknown cache {word}")
    return cache


def layers_of(cache: Cache) -> list[Any]:
    """The layers, which transformers types by a mixin that lacks most of their methods."""
    return cache.layers


def room(cache: Cache) -> int:
    """How many tokens may be appended, and still be rolled back, before the cache must `settle`."""
    return min((layer.room() for layer in cache.layers if isinstance(layer, QuantizedLayer)), default=2**31)


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
    for layer in layers_of(cache):
        layer.restart()


def stored_tokens(cache: Cache) -> int:
    """How many tokens are in quantized groups."""
    layer = cache.layers[0]
    return layer.stored if isinstance(layer, QuantizedLayer) else 0


def rollback(cache: Cache, tokens: int) -> None:
    """Forget the newest `tokens` tokens."""
    if tokens > 0:
        for layer in layers_of(cache):
            if layer.is_initialized:  # layers that share another's keys and values hold nothing
                layer.crop(-tokens)


@dataclass(frozen=True)
class Mark:
    """A quantized cache after whole prefill chunks: its `tokens`, and copies of each layer's full-precision window.

    What was stored in groups by then stays as it is, whatever follows. What follows is rounded differently when it is
    decoded and when it is prefilled, so that a mark is the only state that a fresh start is sure to pass through.
    """

    tokens: int
    chunk: int
    windows: list[tuple[torch.Tensor, torch.Tensor] | None]


def mark(cache: Cache, chunk: int) -> Mark | None:
    """The state to come back to; None for a cache that keeps what it was given and can drop its newest tokens."""
    if not _quantized(cache):
        return None
    return Mark(cache.get_seq_length(), chunk, [layer.window() for layer in layers_of(cache)])


def resume(cache: Cache, tokens: int, chunk: int, marked: Mark | None) -> int:
    """Go back to the longest state within the first `tokens` tokens that prefilling them in chunks would reach.

    Returns how many tokens the cache then holds; at 0 it is to be restarted.
    """
    if tokens <= 0 or any(getattr(layer, "record_past", False) for layer in cache.layers):
        return 0  # layers with a window have dropped what lies before it
    if not _quantized(cache):
        rollback(cache, cache.get_seq_length() - tokens)
        return tokens
    if marked is None or marked.tokens > tokens or marked.chunk != chunk:
        return 0
    for layer, window in zip(layers_of(cache), marked.windows, strict=True):
        if window is not None:
            layer.go_back(marked.tokens, *window)
    return marked.tokens


def _quantized(cache: Cache) -> bool:
    return any(isinstance(layer, QuantizedLayer) for layer in cache.layers)


def stored_bytes(cache: Cache) -> int:
    """What the cache holds on its device now, in bytes."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    )


def _has_sliding_layers(text: Any) -> bool:
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(text, "sliding_window", None))
