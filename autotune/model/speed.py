"""How fast a decode step can be: at batch 1 it reads every weight and the whole cache once."""

from __future__ import annotations

from ..config import Configuration
from .kv_cache import kv_by_layer
from .shape import ModelShape
from .weights import model_bytes


def decode_floor_s(
    target: ModelShape, configuration: Configuration, context: int, new_tokens: int, bandwidth: float
) -> float:
    """The least time of one decode step after `context` + `new_tokens` tokens: bytes over bandwidth, in bytes/s.

    Embeddings are left out, of which a step reads one row. With speculation it is that of one verification, without
    the drafting.
    """
    c = configuration
    weights, head, *_ = model_bytes(target, c.weights, c.lm_head, c.embeddings)
    return (weights + head + sum(kv_by_layer(target, c, context + new_tokens + c.depth, c.weights))) / bandwidth
