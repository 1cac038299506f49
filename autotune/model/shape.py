"""A model's shape, from its `config.json` and, where there are any, from its tensors' headers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .folder import CONFIG, PlanError, Tensor, read_config, read_tensors, same_tensor
from .kept import Attention, Kept, attends, kept_by_layer
from .loaded import loaded
from .positions import positions
from .stored import PARTS, QUANTO_GROUP, Packing, UnreadablePacking, read_packing

# By the words of a config.json's torch_dtype.
_ELEMENT_BYTES = {"float32": 4, "float": 4, "float16": 2, "bfloat16": 2}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(embed_tokens|embed_in|embed|wte|word_embeddings?|tok_embeddings|tokens_embed|embeddings|embed_tokens_per_layer"
    r"|input_embedding|w)\.weight$"
)
_LM_HEAD = re.compile(r"(?:^|\.)(lm_head|embed_out|output|head)\.weight$")
_MATRIX = re.compile(r"^(?!.*(?:embed|wpe)[^.]*\.weight$).*\.weight$")
_OTHER_TOWER = re.compile(r"(?:^|\.)(vision|visual|audio|multi_modal|vqmodel)")
# Of a mixture: experts' matrices, which are one tensor when loaded, and its router's, which is no linear layer.
_EXPERT = re.compile(r"\.experts\.\d+\.|\.(?:gate|router)\.weight$")
# Predicts further tokens, or is a table that is computed: transformers does not load it. Nor what layers that share
# another's keys and values would have made their own with.
_NOT_LOADED = re.compile(r"(?:^|\.)mtp[^.]*\.|\.inv_freq$")
_MASK = re.compile(r"\.(?:attn|attention)\.(?:masked_)?bias$")  # unless it is a vector
_SHARED = re.compile(r"\.self_attn\.[kv]_(?:proj|norm)\.")
# Types whose other towers do not lie beside a text tower of its own name, and are loaded with it.
_WITH_TOWERS = ("fuyu", "phi4_multimodal")
_SINKS = re.compile(r"\.(?:sinks|softmax_offset|attention_sink_bias)$")
# What families call a size, where it is not what most of them call it.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embedding_dim", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_COUNT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# Families all of whose layers slide where there is a `sliding_window` (the Qwen ones: from `max_window_layers` on).
_SLIDING = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
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
    index_elements: int = 0  # of its index key per token, held in the model's type whatever the cache
    window: int | None = None  # tokens that a sliding layer attends to
    head_dims: tuple[int, int] = (0, 0)  # of a key and of a value; the model's where it is 0
    conv_elements: int = 0  # the last inputs of its convolutions, held in the model's type whatever the context
    recurrent_elements: int = 0  # its recurrent state, held in float32 whatever the context
    fixed: int = 0  # elements of matrices that no word quantizes: experts, convolutions


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
    left_out_bytes: int = 0  # of the checkpoint's other towers, which are not loaded
    soft_capped: bool = False  # attention's scores
    sinks: bool = False
    shared_layers: int = 0  # that read another layer's keys and values

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

    A `text_config` is followed, and only what transformers loads for a causal model is counted. Raises PlanError (a
    ValueError) for a folder or family that cannot be read.
    """
    whole = read_config(folder)
    text = whole.get("text_config")
    config = {**whole, **_without_none(text)} if isinstance(text, dict) else whole
    tensors, left_out = loaded(whole, read_tensors(folder))
    model_type = str(config.get("model_type", "unknown"))
    if not tensors and model_type not in _FAMILIES:
        mend = f"put its safetensors beside it, or use one of {', '.join(_FAMILIES)}"
        raise PlanError(f"the sizes of model_type '{model_type}' do not follow from {folder / CONFIG} alone; {mend}")
    try:
        packing = read_packing(config.get("quantization_config"))
    except UnreadablePacking as error:
        raise PlanError(f"{folder / CONFIG}: {error}") from error
    if isinstance(text, dict) and whole.get("model_type") not in _WITH_TOWERS:
        tensors = {name: tensor for name, tensor in tensors.items() if not _OTHER_TOWER.search(name)}
    if packing is not None:
        tensors, config = _held(tensors, packing), {**config, "dtype": "bfloat16"}
    try:
        config = {**_FAMILIES.get(model_type, {}), **_without_none(config)}
        if config.get("tie_word_embeddings") and _own_head(folder, tensors):
            config["tie_word_embeddings"] = False
        shape = _shape(model_type, config, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{folder / CONFIG} lacks a usable value ({error}); put the model's own beside it") from error
    return dataclasses.replace(shape, left_out_bytes=left_out)


def _own_head(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint's lm_head differs from its embedding: then they are not tied, whatever the config says."""
    outside = [name for name in tensors if not _LAYER.search(name) and not _OTHER_TOWER.search(name)]
    heads, embeddings = ([n for n in outside if kind.search(n)] for kind in (_LM_HEAD, _EMBEDDING))
    embeddings = [name for name in embeddings if "per_layer" not in name]
    return len(heads) == len(embeddings) == 1 and not same_tensor(folder, heads[0], embeddings[0])


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
    name = next((name for name in names if name in config), names[0])
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise KeyError(name)
    return value


def _shape(model_type: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModelShape:
    hidden, vocab = _first(config, *_HIDDEN), _first(config, "vocab_size")
    if tensors and not attends(tensors):
        config = {"num_attention_heads": 1, **config}  # has no heads to speak of
    heads = _first(config, *_HEADS)
    kv_heads = heads if model_type == "gpt_neox" else _first(config, *_KV_HEADS, *_HEADS)
    head_dim = _first({"": hidden // heads, **config}, "head_dim", "kv_channels", "dim_head", "")
    if "kv_lora_rank" in config and "qk_nope_head_dim" in config:  # as its heads see the latent
        head_dim = _first(config, "qk_nope_head_dim") + _first(config, "qk_rope_head_dim")
    last = max((int(layer[1]) for layer in map(_layer, tensors) if layer), default=-1)
    count = _first({"": last + 1, **config}, *_COUNT, "")
    element = _ELEMENT_BYTES.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), 2)
    shared = int(config.get("num_kv_shared_layers", 0))
    tied = bool(config.get("tie_word_embeddings", False))
    attention = Attention(hidden, heads, kv_heads, head_dim)
    if tensors:
        blocks, embedding, head, within = _sort_tensors(tensors, count, shared)
        # A head of another size than the embedding is one of its own, whatever the config says.
        same = any(math.prod(t.shape) == head for name, t in tensors.items() if _EMBEDDING.search(name))
        tied = head == 0 or (tied and (same or not embedding))
        head = head or vocab * hidden
        embedding = embedding or (head if tied else 0)  # a tied pair may be stored under either name
        kept = kept_by_layer(config, within, attention, shared)
        kv_heads = max((each.keys // each.head_dims[0] for each in kept if each.keys), default=kv_heads)
    else:
        blocks = [_formula(model_type, config, hidden, heads * head_dim, kv_heads * head_dim, element)] * count
        norms = 2 * hidden if model_type == "gpt_neox" else hidden
        blocks.append(LayerShape((), norms, norms * element))
        embedding = head = vocab * hidden
        kept = [attention.kept] * count
    windows = _windows(model_type, config, count)
    if len(windows) != count or not all(window is None or type(window) is int for window in windows):
        raise ValueError("layer_types or sliding_window")
    if isinstance(config.get("intermediate_size"), list):
        config["intermediate_size"] = max(config["intermediate_size"])  # each layer has its own
    largest = max((max(n.out, n.inp) for b in blocks[:count] for n in b.linears), default=4 * hidden)
    return ModelShape(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_first({"largest": largest, **config}, "intermediate_size", "largest"),
        layers=tuple(_with(*each) for each in zip(blocks, kept, windows, strict=False)),
        rest=blocks[count],
        embedding_elements=embedding,
        lm_head_elements=head,
        tied=tied,
        element_bytes=element,
        max_position_embeddings=positions(model_type, config),
        exact=bool(tensors),
        prequantized="quantization_config" in config,
        soft_capped=config.get("attn_logit_softcapping") is not None,
        sinks=any(_SINKS.search(name) for name in tensors),
        shared_layers=shared,
    )


def _with(block: LayerShape, kept: Kept, window: int | None) -> LayerShape:
    return dataclasses.replace(
        block,
        kv_elements=kept.keys + kept.values,
        index_elements=kept.index_keys,
        window=window,
        head_dims=kept.head_dims,
        conv_elements=kept.conv,
        recurrent_elements=kept.recurrent,
    )


def _layer(name: str) -> re.Match[str] | None:
    return None if _OTHER_TOWER.search(name) else _LAYER.search(name)


def _is_linear(name: str, tensor: Tensor) -> bool:
    packed = tensor.dtype == "PACKED"
    return tensor.dtype[0] in "FBP" and bool(_MATRIX.search(name)) and (packed or not _EXPERT.search(name))


def _sort_tensors(
    tensors: Mapping[str, Tensor], count: int, shared: int
) -> tuple[list[LayerShape], int, int, list[dict[str, Tensor]]]:
    """The blocks (`count` layers, then the rest), the elements of the embedding and those of the lm_head.

    And each layer's tensors by their names within it. The last `shared` layers read others' keys and values.
    """
    linears: list[list[Linear]] = [[] for _ in range(count + 1)]
    within: list[dict[str, Tensor]] = [{} for _ in range(count)]
    other, stored, fixed, embedding, head = [0] * (count + 1), [0] * (count + 1), [0] * (count + 1), 0, 0
    for name, tensor in tensors.items():
        layer, elements = _layer(name), math.prod(tensor.shape)
        block = int(layer[1]) if layer else count
        if _NOT_LOADED.search(name) or (_MASK.search(name) and len(tensor.shape) != 1):
            continue
        if layer and (block >= count or (block >= count - shared and _SHARED.search(name))):
            continue
        if layer:
            within[block][name[layer.end() :]] = tensor
        plain = len(tensor.shape) == 2
        table = plain and layer is None and not _OTHER_TOWER.search(name)
        if table and _LM_HEAD.search(name):
            head += elements
        elif table and _EMBEDDING.search(name):
            embedding += elements
        elif plain and _is_linear(name, tensor):
            linears[block].append(Linear(name, tensor.shape[0], tensor.shape[1], tensor.stored))
        else:
            other[block], stored[block] = other[block] + elements, stored[block] + tensor.stored
            fixed[block] += elements if len(tensor.shape) > 1 else 0
    blocks = [LayerShape(tuple(n), o, s, fixed=f) for n, o, s, f in zip(linears, other, stored, fixed, strict=True)]
    return blocks, embedding, head, within


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
    """Per layer: the window, or None where it sees all tokens."""
    window = config.get("sliding_window") or config.get("sliding_window_size")
    window = window if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if kinds is None:
        pattern, first = config.get("sliding_window_pattern"), config.get("max_window_layers", 0)
        if pattern:
            sliding = [bool((layer + 1) % pattern) for layer in range(count)]
        else:
            sliding = [family in _SLIDING and layer >= first for layer in range(count)]
        return [window if slides else None for slides in sliding]
    sizes = {"sliding_attention": window, "hybrid_sliding": window}
    sizes |= {"chunked_attention": config.get("attention_chunk_size")}
    return [sizes.get(kind) or None for kind in kinds]
