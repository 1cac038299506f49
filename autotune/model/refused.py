"""What the engine refuses of a model, as far as config.json and the tensors' headers show it: said before a load.

The engine looks at the loaded model and has the last word. A model whose type is not named here is refused there, if
its steps through a cache differ from a pass over the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..config import WEIGHTS
from .folder import CONFIG, PlanError, read_config, read_tensors
from .shape import ModelShape

# Words of a config for layers that keep more than keys, values and states.
_OTHER_KINDS = (
    "minimax_m3_sparse",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "reference_sliding_attention",
)
_OTHER_TENSORS = re.compile(r"\.compressor\.")
# Types whose forward pass, in transformers, does not put what it keeps where a request can bring it.
_OUTSIDE = {
    "minimax": "asks for a cache of its own",
    "openai-gpt": "keeps no keys and values",
    "recurrent_gemma": "keeps its state in its layers, outside of the cache",
    "reformer": "keeps its hidden states in a cache of its own",
    "rwkv": "keeps its state outside of the cache",
    "xlstm": "asks for a cache of its own",
}


def check_type(folder: Path) -> None:
    """Raises PlanError for a model that no request can run on."""
    config = read_config(folder)
    text = config.get("text_config")
    config |= text if isinstance(text, dict) else {}
    model_type, kinds = str(config.get("model_type")), config.get("layer_types")
    if model_type in _OUTSIDE:
        raise PlanError(
            f"{folder / CONFIG} says model_type = {model_type}: such a model {_OUTSIDE[model_type]}, and autotune "
            "feeds a model step by step through caches of its own; it cannot run here"
        )
    kind = next((kind for kind in kinds if kind in _OTHER_KINDS), None) if isinstance(kinds, list) else None
    if kind or any(_OTHER_TENSORS.search(name) for name in read_tensors(folder)):
        raise PlanError(
            f"{folder} has {kind or 'sparse attention'} layers ({model_type}): they keep more of a token than its keys "
            "and values, which autotune's caches have no place for; it cannot run here"
        )


def word_refusals(target: ModelShape, drafts: Sequence[ModelShape] = ()) -> dict[str, dict[str, str]]:
    """Per knob, the words that cannot run and why. The draft's cache and attention follow the target's."""
    packed = [_weights_refusal(draft) for draft in drafts]
    refused = {"weights": _weights_refusal(target), "draft_weights": packed[0] if packed and all(packed) else ""}
    words = [word for word in WEIGHTS if word not in ("bf16", "fp32", "checkpoint")]
    found = {knob: dict.fromkeys(words, reason) for knob, reason in refused.items() if reason}
    found["cache"] = {f"quantized-{bits}": _cache_refusal(target, bits) for bits in (8, 4, 2)}
    found["attention"] = {"split_kv": _split_kv_refusal(target)}
    return {knob: {word: reason for word, reason in words.items() if reason} for knob, words in found.items()}


def _weights_refusal(shape: ModelShape) -> str:
    """As the engine's `check_linear`: most of the weights would stay as they are."""
    blocks = (*shape.layers, shape.rest)
    left, linear = sum(block.fixed for block in blocks), sum(n.out * n.inp for block in blocks for n in block.linears)
    if shape.prequantized or left <= (left + linear) / 2:
        return ""
    return f"it stores linear layers; {left / (left + linear):.0%} of the model's weights are in others, as experts are"


def _head_dims(shape: ModelShape) -> set[tuple[int, int]]:
    found = {layer.head_dims for layer in shape.layers if layer.kv_elements}
    return {(key or shape.head_dim, value or shape.head_dim) for key, value in found}


def _cache_refusal(shape: ModelShape, bits: int) -> str:
    for dim in sorted({dim for dims in _head_dims(shape) for dim in dims}):
        if dim * bits % 8:
            return f"it needs keys and values that fill whole bytes, not of {dim}"
    return ""


def _split_kv_refusal(shape: ModelShape) -> str:
    if shape.soft_capped:
        return "it has no soft-capping of scores"
    if shape.sinks:
        return "it has no attention sinks"
    if shape.shared_layers:
        return "it cannot read the keys and values of another layer"
    if any(key != value for key, value in _head_dims(shape)):
        return "it needs keys and values of one size"
    return ""
