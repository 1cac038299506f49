"""The tensors of a checkpoint that the engine loads, as linear layers have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .folder import Tensor

TOWER = re.compile(r"(^|\.)(?:language_model|text_model)\.")  # where multimodal checkpoints keep their text tower
_LM_HEAD = re.compile(r"(?:^|\.)lm_head\.")
# Types whose layers are transformers' Conv1D, with a row per input, and the names of these layers.
_ACROSS = ("gpt2", "openai-gpt")
_CONV1D = re.compile(r"\.(?:c_attn|c_proj|c_fc|q_attn)\.weight$")


def loaded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Of a multimodal model the text tower alone, and the bytes that the checkpoint holds besides."""
    held = dict(tensors)
    if isinstance(config.get("text_config"), dict) and any(map(TOWER.search, tensors)):
        held = {name: held[name] for name in tensors if TOWER.search(name) or _LM_HEAD.search(name)}
    left_out = sum(tensor.stored for name, tensor in tensors.items() if name not in held)
    if config.get("model_type") in _ACROSS:
        held = {
            name: tensor._replace(shape=tensor.shape[::-1]) if _CONV1D.search(name) else tensor
            for name, tensor in held.items()
        }
    return held, left_out
