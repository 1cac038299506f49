"""Bytes of what a model keeps of the tokens that it has seen: keys and values, and the states of layers that have some.

Keys and values are as many elements per token as the layer's tensors say (2 * kv_heads * head_dim where heads are all
alike). States do not grow with the context; a copy of each is kept to go back to while tokens are proposed.
"""

from __future__ import annotations

import math

from ..config import Configuration
from .shape import LayerShape, ModelShape
from .weights import element_bytes

# As engine/cache/quantized.py and engine/graph.py have them.
CACHE_GROUP = 64  # tokens (of keys) or channels (of values) that share a scale and a minimum in a quantized cache
CACHE_SCALE = 2  # bytes of a scale, and of a minimum
CACHE_WINDOW = 32 + CACHE_GROUP  # slots for the latest tokens, which a quantized cache keeps in full precision
RECURRENT_BYTES = 4  # of an element of a recurrent state, which transformers holds in float32
CACHE_SPARE = 32  # slots more where steps are recorded, which may be longer than what they add: LONGEST tokens


def kv_by_layer(shape: ModelShape, c: Configuration, tokens: int, weights: str) -> list[int]:
    """Each layer's share, at `tokens` with the deepest speculation; the draft's cache is as the target's."""
    return [
        _kv_bytes(shape, layer, c, tokens, weights) + _state_bytes(shape, layer, c, weights) for layer in shape.layers
    ]


def _state_bytes(shape: ModelShape, layer: LayerShape, c: Configuration, weights: str) -> int:
    state = layer.conv_elements * element_bytes(shape, weights) + layer.recurrent_elements * RECURRENT_BYTES
    return state * (1 if c.draft == "none" else 2)


def _kv_bytes(shape: ModelShape, layer: LayerShape, c: Configuration, tokens: int, weights: str) -> int:
    element = element_bytes(shape, weights)
    if c.cache in ("dynamic", "sliding", "offloaded"):
        kept = min(tokens, layer.window or tokens) if c.cache == "sliding" else tokens
        return (layer.kv_elements * kept + layer.index_elements * tokens) * element
    slots, spare = tokens + 1, 0
    if c.launch != "eager" or c.attention == "split_kv":  # recorded steps share a cache of a round size
        size = 256 if slots <= 4096 else 512
        slots, spare = -(-slots // size) * size, CACHE_SPARE
    if c.cache == "static":
        return (layer.kv_elements + layer.index_elements) * (slots + spare) * element
    slots = -(-slots // CACHE_GROUP) * CACHE_GROUP
    recent = (layer.kv_elements + layer.index_elements) * (CACHE_WINDOW + spare) * element
    return round(slots * _token_bytes(shape, layer, c.cache, element) + recent)


def token_bytes(shape: ModelShape, cache: str, weights: str) -> float:
    """Bytes per cached token, with its share of scales and minima."""
    return sum(_token_bytes(shape, layer, cache, element_bytes(shape, weights)) for layer in shape.layers)


def stored_share(shape: ModelShape, cache: str, weights: str) -> float:
    """Bytes per cached token, as a share of those in full precision."""
    full = token_bytes(shape, "dynamic", weights)
    return token_bytes(shape, cache, weights) / full if full else 0.0


def _token_bytes(shape: ModelShape, layer: LayerShape, cache: str, element: int) -> float:
    key, value = (dim or shape.head_dim for dim in layer.head_dims)
    keys = layer.kv_elements * key / (key + value)
    values = layer.kv_elements - keys
    match cache:
        case "quantized-8" | "quantized-4" | "quantized-2":
            ranges = keys / CACHE_GROUP + values / math.gcd(CACHE_GROUP, value)
            stored = layer.kv_elements * int(cache[-1]) / 8 + ranges * 2 * CACHE_SCALE
        case "quantized-fp8":
            stored = layer.kv_elements + CACHE_SCALE * (keys / key + values / value)
        case _:
            stored = layer.kv_elements * element
    return stored + layer.index_elements * element
