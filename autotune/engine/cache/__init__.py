"""KV caches that can be appended to and rolled back without touching what is already stored: the door."""

from .cache import (
    Mark,
    advance,
    copy_states,
    go_back_to,
    layers_of,
    lengths_on_device,
    make_cache,
    mark,
    quantized,
    restart,
    resume,
    rollback,
    room,
    settle,
    states_of,
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
    "copy_states",
    "go_back_to",
    "layers_of",
    "lengths_on_device",
    "make_cache",
    "mark",
    "quantized",
    "restart",
    "resume",
    "rollback",
    "room",
    "settle",
    "states_of",
    "stored_bytes",
    "stored_tokens",
]
