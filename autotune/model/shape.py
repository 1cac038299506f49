"""A model's shape, from its `config.json` and, where there are any, from its tensors' headers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .folder import CONFIG, PlanError, Tensor, read_config, read_tensors
from .stored import PARTS, QUANTO_GROUP, Packing, UnreadablePacking, read_packing

# By the words of a config.json's torch_dtype.
_ELEMENT_BYTES = {"float32": 4, "float": 4, "float16": 2, "bfloat16": 2}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embed_tokens_per_layer)\.")
_LM_HEAD = re.compile(r"(?:^|\.)(lm_head|embed_out|output)\.weight$")
_MATRIX = re.compile(r"^(?!.*(?:embed|wpe|norm)).*\.weight$")
_OTHER_TOWER = re.compile(r"(?:^|\.)(vision|visual|audio|multi_modal)")
# What transformers fills in where a config.json leaves it out.
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("llama", "phi3", "granite", "olmo2")},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
    | {"sliding_window": 4096, "sliding_window_pattern": 6},
    "gpt_neox": {"attention_bias": True},
}


class Linear(NamedTuple):
    """A weight matrix of `out` rows and `inp` columns; `stored` is its size in the checkpoint."""

    name: str
    out: int
    inp: int
    stored: int


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer, or what lies outside of them: its matrices, its other elements, its share of the cache."""

    linears: tuple[Linear, ...]
    other: int = 0  # elements of norms, biases and whatever is never quantized
    other_stored: int = 0
    kv_elements: int = 0  # keys and values per token
    window: int | None = None  # tokens that a sliding layer attends to


@dataclass(frozen=True)
class ModelShape:
    """All that a prediction knows of a model. Counts are elements; `stored` counts are bytes in the checkpoint."""

    model_type: str
    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerShape, ...]
    rest: LayerShape  # what is outside the layers: the final norm, position embeddings, other towers
    embedding_elements: int
    lm_head_elements: int
    tied: bool
    element_bytes: int  # of the checkpoint's unquantized tensors
    max_position_embeddings: int | None
    exact: bool  # read from tensor headers, not from formulas
    prequantized: bool

    @property
    def parameters(self) -> int:
        """Elements in all, a tied lm_head once."""
        blocks = sum(n.out * n.inp for n in self._linears) + sum(block.other for block in (*self.layers, self.rest))
        return blocks + self.embedding_elements + (0 if self.tied else self.lm_head_elements)

    @cached_property
    def sizes(self) -> dict[tuple[str, str, str], tuple[int, int, int, int]]:
        """What `model_bytes` counted already: a space asks for the same few again and again."""
        return {}

    @cached_property
    def _linears(self) -> tuple[Linear, ...]:
        return tuple(linear for block in (*self.layers, self.rest) for linear in block.linears)

    @cached_property
    def largest_linear(self) -> int:
        """Elements of the largest matrix that is quantized."""
        return max((n.out * n.inp for n in self._linears), default=self.hidden_size * self.intermediate_size)

    @cached_property
    def mlp_copies(self) -> int:
        """Vectors of the intermediate size that are alive together: activation, up and product; or in and out."""
        names = " ".join(linear.name for linear in self._linears)
        return 4 if "gate_up" in names else 3 if "gate" in names or "w3" in names else 2

    @cached_property
    def gate_and_up(self) -> int:
        """Elements of a layer's gate_proj and up_proj together; 0 where they are not apart."""
        parts = [n for n in self.layers[0].linears if "gate_proj" in n.name or "up_proj" in n.name]
        return sum(n.out * n.inp for n in parts) if len(parts) == 2 else 0


def read_shape(folder: Path) -> ModelShape:
    """The model's shape, from its tensors' headers or else its family's formulas.

    A `text_config` is followed. Raises PlanError (a ValueError) for a folder or family that cannot be read.
    """
    whole = read_config(folder)
    text = whole.get("text_config")
    config = {**whole, **_without_none(text)} if isinstance(text, dict) else whole
    tensors = read_tensors(folder)
    model_type = str(config.get("model_type", "unknown"))
    if not tensors and model_type not in _FAMILIES:
        mend = f"put its safetensors beside it, or use one of {', '.join(_FAMILIES)}"
        raise PlanError(f"the sizes of model_type '{model_type}' do not follow from {folder / CONFIG} alone; {mend}")
    try:
        packing = read_packing(config.get("quantization_config"))
    except UnreadablePacking as error:
        raise PlanError(f"{folder / CONFIG}: {error}") from error
    if packing is not None:
        tensors, config = _held(tensors, packing), {**config, "dtype": "bfloat16"}
    try:
        return _shape(model_type, {**_FAMILIES.get(model_type, {}), **_without_none(config)}, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{folder / CONFIG} has an unusable value ({error}); download the model again") from error


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


def _held(tensors: Mapping[str, Tensor], packing: Packing) -> dict[str, Tensor]:
    """The tensors at the sizes that they are held at, each packed layer's as one weight; the others are held in bf16.

    A packed layer keeps its codes and, per group of at most QUANTO_GROUP inputs, a scale and a zero in bf16.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight" and len(tensor.shape) == 2 and 0 not in tensor.shape:
            out, inp = packing.size(tensor.shape)
            groups = inp // min(packing.group(inp), QUANTO_GROUP)
            order = 4 * inp if packing.desc_act else 0
            # not named as a plain weight: a packed lm_head is one of the matrices
            held[f"{layer}.packed.weight"] = Tensor((out, inp), "PACKED", tensor.stored + 4 * groups * out + order)
        elif part not in PARTS or f"{layer}.qweight" not in tensors:
            held[name] = tensor._replace(stored=2 * math.prod(tensor.shape))
    return held


def _first(config: Mapping[str, Any], *names: str) -> int:
    value = next((config[name] for name in names if name in config), None)
    if type(value) is not int or value < 1:
        raise KeyError(names[0])
    return value


def _shape(model_type: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModelShape:
    hidden, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    kv_heads = _first(config, "num_key_value_heads", "num_attention_heads", "n_head")
    head_dim = _first({"head_dim": hidden // heads, **config}, "head_dim")
    vocab, count = _first(config, "vocab_size"), _first(config, "num_hidden_layers", "n_layer")
    element = _ELEMENT_BYTES.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), 2)
    tied = bool(config.get("tie_word_embeddings", False))
    if tensors:
        blocks, embedding, head = _sort_tensors(tensors, count)
        tied, head = (tied or head == 0), head or vocab * hidden
    else:
        blocks = [_formula(model_type, config, hidden, heads * head_dim, kv_heads * head_dim, element)] * count
        norms = 2 * hidden if model_type == "gpt_neox" else hidden
        blocks.append(LayerShape((), norms, norms * element))
        embedding = head = vocab * hidden
    kv = 2 * kv_heads * head_dim
    windows = _windows(model_type, config, count)
    if len(windows) != count or not all(window is None or type(window) is int for window in windows):
        raise ValueError("layer_types or sliding_window")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    layers = tuple(
        LayerShape(block.linears, block.other, block.other_stored, 0 if window == 0 else kv, window or None)
        for block, window in zip(blocks, windows, strict=False)
    )
    largest = max((max(n.out, n.inp) for b in blocks[:count] for n in b.linears), default=4 * hidden)
    return ModelShape(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_first({"largest": largest, **config}, "intermediate_size", "largest"),
        layers=layers,
        rest=blocks[count],
        embedding_elements=embedding,
        lm_head_elements=head,
        tied=tied,
        element_bytes=element,
        max_position_embeddings=positions if isinstance(positions, int) else None,
        exact=bool(tensors),
        prequantized="quantization_config" in config,
    )


def _sort_tensors(tensors: Mapping[str, Tensor], count: int) -> tuple[list[LayerShape], int, int]:
    """The blocks (`count` layers, then the rest), the elements of the embedding and those of the lm_head."""
    linears: list[list[Linear]] = [[] for _ in range(count + 1)]
    other, stored, embedding, head = [0] * (count + 1), [0] * (count + 1), 0, 0
    for name, tensor in tensors.items():
        elements = math.prod(tensor.shape)
        layer = None if _OTHER_TOWER.search(name) else _LAYER.search(name)
        block = min(int(layer[1]), count) if layer else count
        if len(tensor.shape) == 2 and layer is None and _LM_HEAD.search(name):
            head += elements
        elif len(tensor.shape) == 2 and layer is None and _EMBEDDING.search(name):
            embedding += elements
        elif len(tensor.shape) == 2 and tensor.dtype[0] in "FBP" and _MATRIX.search(name):
            linears[block].append(Linear(name, tensor.shape[0], tensor.shape[1], tensor.stored))
        else:
            other[block], stored[block] = other[block] + elements, stored[block] + tensor.stored
    return [LayerShape(tuple(n), o, s) for n, o, s in zip(linears, other, stored, strict=True)], embedding, head


def _formula(family: str, config: dict[str, Any], hidden: int, q: int, kv: int, element: int) -> LayerShape:
    """One layer of a known family; `q` and `kv` are the widths of the query and of the key projections."""
    inner = _first(config, "intermediate_size")
    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    other = (4 if family in ("gemma2", "gemma3_text") else 2) * hidden  # norms
    match family:
        case "gpt_neox":
            shapes = {"query_key_value": (3 * hidden, hidden), "dense": (hidden, hidden)}
            shapes |= {"dense_h_to_4h": (inner, hidden), "dense_4h_to_h": (hidden, inner)}
            other += 2 * hidden + inner + hidden + (4 * hidden if attention else 0)
        case "phi3":
            shapes = {"qkv_proj": (q + 2 * kv, hidden), "o_proj": (hidden, q)}
            shapes |= {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        case "qwen2":
            other += q + 2 * kv
        case "llama" | "qwen3" | "gemma" | "gemma2" | "gemma3_text" | "granite" | "olmo2":
            other += (q + 2 * kv + hidden if attention else 0) + (2 * inner + hidden if mlp else 0)
    if family in ("qwen3", "gemma3_text"):
        other += 2 * config.get("head_dim", 0)
    elif family == "olmo2":
        other += q + kv
    linears = tuple(Linear(name, out, inp, out * inp * element) for name, (out, inp) in shapes.items())
    return LayerShape(linears, other, other * element)


def _windows(family: str, config: Mapping[str, Any], count: int) -> list[int | None]:
    """Per layer: the window, None for full attention, 0 for a layer that keeps no keys and values."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if kinds is None:
        pattern, first = config.get("sliding_window_pattern"), config.get("max_window_layers", 0)
        if pattern:
            sliding = [bool((layer + 1) % pattern) for layer in range(count)]
        else:
            sliding = [family in ("mistral", "phi3", "qwen2", "qwen3") and layer >= first for layer in range(count)]
        return [window if slides else None for slides in sliding]
    sizes = {"sliding_attention": window, "chunked_attention": config.get("attention_chunk_size")}
    sizes |= {"linear_attention": 0, "conv": 0, "mamba": 0}
    return [sizes.get(kind) for kind in kinds]
