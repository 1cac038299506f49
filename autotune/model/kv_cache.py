"""Bytes of a KV cache: 2 * kv_heads * head_dim elements per layer and token (kv_heads, not heads)."""

from __future__ import annotations

import math

from ..config import Configuration
from .shape import LayerShape, ModelShape
from .weights import element_bytes

# As engine/cache/quantized.py and engine/graph.py have them.
CACHE_GROUP = 64  # tokens (of keys) or channels (of values) that share a scale and a minimum in a quantized cache
CACHE_SCALE = 2  # bytes of a scale, and of a minimum
CACHE_WINDOW = 32 + CACHE_GROUP  # slots for the latest tokens, which a quantized cache keeps in full precision
CACHE_SPARE = 32  # slots more where steps are recorded, which may be longer than what they add: LONGEST tokens


def kv_by_layer(shape: ModelShape, c: Configuration, tokens: int, weights: str) -> list[int]:
    """Each layer's keys and values, at `tokens` with the deepest speculation; the draft's cache is as the target's."""
    return [_kv_bytes(shape, layer, c, tokens, weights) for layer in shape.layers]


def _kv_bytes(shape: ModelShape, layer: LayerShape, c: Configuration, tokens: int, weights: str) -> int:
    element = element_bytes(shape, weights)
    if c.cache in ("dynamic", "sliding", "offloaded"):
        kept = min(tokens, layer.window or tokens) if c.cache == "sliding" else tokens
        return layer.kv_elements * kept * element
    slots, spare = tokens + 1, 0
    if c.launch != "eager" or c.attention == "split_kv":  # recorded steps share a cache of a round size
        size = 256 if slots <= 4096 else 512
        slots, spare = -(-slots // size) * size, CACHE_SPARE
    if c.cache == "static":
        return layer.kv_elements * (slots + spare) * element
    slots = -(-slots // CACHE_GROUP) * CACHE_GROUP
    recent = (CACHE_WINDOW + spare) * element
    return round(layer.kv_elements * (slots * cache_element_bytes(shape, c.cache, weights) + recent))


def cache_element_bytes(shape: ModelShape, cache: str, weights: str) -> float:
    """Bytes of a cached element, with its share of scales and minima."""
    match cache:
        case "quantized-8" | "quantized-4" | "quantized-2":
            channels = math.gcd(CACHE_GROUP, shape.head_dim)
            return int(cache[-1]) / 8 + CACHE_SCALE / CACHE_GROUP + CACHE_SCALE / channels
        case "quantized-fp8":
            return 1 + CACHE_SCALE / shape.head_dim
    return element_bytes(shape, weights)
