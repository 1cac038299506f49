"""KV caches that can be appended to and rolled back without touching what is already stored: the door."""

from .cache import (
    Mark,
    advance,
    layers_of,
    lengths_on_device,
    make_cache,
    mark,
    restart,
    resume,
    rollback,
    room,
    settle,
    stored_bytes,
    stored_tokens,
)
from .layers import Lengths, StaticLayer
from .quantized import GROUP, WINDOW, Float8Layer, QuantizedLayer

__all__ = [
    "GROUP",
    "WINDOW",
    "Float8Layer",
    "Lengths",
    "Mark",
    "QuantizedLayer",
    "StaticLayer",
    "advance",
    "layers_of",
    "lengths_on_device",
    "make_cache",
    "mark",
    "restart",
    "resume",
    "rollback",
    "room",
    "settle",
    "stored_bytes",
    "stored_tokens",
]
