"""How long a text a model's positions reach: what it was trained for, and what its rope scaling allows beyond."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The types of rope scaling whose max_position_embeddings is the length before scaling in some checkpoints and after it
# in others; with the others it is the length after, unless it is the original one.
_BEFORE_OR_AFTER = ("yarn", "linear", "dynamic")
# What families call the length.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "seq_length", "n_ctx")
_AFTER = ("gemma3", "gemma3_text")  # model types that state the length after linear scaling


def positions(model_type: str, config: Mapping[str, Any]) -> int | None:
    """The longest text, in tokens; None where the config.json states no length."""
    stated = next((config[name] for name in _NAMES if name in config), None)
    if type(stated) is not int:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):  # a rope for each type of layer
        rope = rope["full_attention"]
    if not isinstance(rope, Mapping):
        return stated
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if type(original) is not int or kind == "dynamic":  # which scales the stated length
        original = stated
    if isinstance(factor, bool) or not isinstance(factor, int | float) or kind in (None, "default"):
        return stated
    if model_type in _AFTER or (kind not in _BEFORE_OR_AFTER and stated > original):
        return stated
    return max(stated, int(factor * original))
