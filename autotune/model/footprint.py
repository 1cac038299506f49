"""The footprint and the speed floor of a configuration, predicted before any weight is read.

Shapes come from `config.json` and, where there are any, from the headers of the safetensors files (8 bytes of length
and a JSON text, https://github.com/huggingface/safetensors#format). The physics:

- A stored matrix costs its elements, and a quantized one its scales as well. The cache costs 2 * kv_heads * head_dim
  elements per layer and token (kv_heads, not heads).
- Activations peak in the pass with the most tokens, which is the prefill: some copies of the hidden state, and the
  MLP's intermediate vectors or the attention's masks and repeated heads, whichever is more. The target's prefill is
  over before the draft's cache is made.
- On a GPU the allocator holds blocks that a cache was cut out of and that nothing fits any more.
- A decode step reads every weight and the whole cache once: bytes over bandwidth is its floor.

`calibrate` learns from records what the physics leaves out. All sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..config import MIB, Budget, Configuration, Record, draft_head
from .stored import PARTS, Packing, UnreadablePacking, read_packing

BNB_BLOCK = 64  # weights that share one absmax
BNB_NESTED_BLOCK = 256  # absmax values that share one second-level scale (double quantization)
BNB_TABLES = 4 * (16 + 256 + 1)  # float32 code books of both levels and the offset, once per matrix
QUANTO_GROUP = 128  # the largest group of qint4; reduced by 32 until it divides the row
CACHE_GROUP = 64  # tokens (of keys) or channels (of values) that share a scale and a minimum in a quantized cache
CACHE_SCALE = 2  # bytes of a scale, and of a minimum
CACHE_WINDOW = 32 + CACHE_GROUP  # slots for the latest tokens, which a quantized cache keeps in full precision
CACHE_SPARE = 32  # slots more where steps are recorded, which may be longer than what they add

HIDDEN_COPIES = 4  # the embeddings, the layer's input, the residual and the normalized input are alive together
ROTARY = 2  # cosines and sines of every position
# Keys and values that split_kv dequantizes or repeats at a time for a prompt, one KV head's at least: this much, or so
# many times the queries' size where that is more, since a chunk's MLP takes as much.
COPIED, COPIED_BY_QUERIES = 16 * MIB, 8
MASK_BYTES = 1  # the boolean mask; the kernel adds a copy of it in the activations' type
SCORE_BYTES = 4  # eager softmax works in float32, between scores and probabilities in the activations' type
LOGIT_BYTES = 4  # logits are cast to float32 for the choice of a token
UNPACKED = 2**24  # weights that quanto-int4 quantizes, or unpacks, at a time on a GPU
# bnb-int8 makes a product in int32; on a CPU, scaling it takes float32 copies beside that.
INT8_PRODUCT_BYTES = {"cuda": 4, "cpu": 16}
MERGED = (
    "bf16",
    "fp32",
    "bnb-nf4",
    "bnb-fp4",
    "quanto-int4",
    "checkpoint",
)  # on a GPU, gate and up are one product of these
# Tokens from which on a whole matrix is expanded before the product; bitsandbytes' own 4-bit kernel takes fewer, and
# quanto-int4 is expanded on a GPU, UNPACKED weights at a time.
DEQUANTIZED_FROM = {"bnb-nf4": 8, "bnb-fp4": 8, "nf4": 8, "quanto-int8": 1, "int8": 1, "int4": 1, "quanto-int4": 128}
MULTIPLIED_ON = {"int8": "cpu", "int4": "cuda"}  # an lm_head that is multiplied as it is stored there
LOAD_COPIES = {"bnb-int8": 2}  # half-precision copies of the matrix being quantized that outweigh a prefill's workspace
QUANTIZING_BYTES = 14  # quanto-int4 on a GPU, UNPACKED weights at a time: three float32 copies and the codes
WORKSPACE = {"cuda": 32 * MIB, "cpu": 0}  # cuBLAS keeps one per process (Hopper's; older GPUs take 8 MiB)
KERNELS = {"cuda": 80 * MIB, "cpu": 0}  # code that CUDA loads as it is first used, after the base was read
INT8_KERNELS = 60 * MIB  # and that of bnb-int8
RECORDED_POOL = 22 * MIB  # the least that PyTorch takes for the pool of recorded steps, which use little of it
# An allocator's segment that is used in part; on a CPU, the code and the kernels of the first pass.
FRAGMENTS = {"cuda": 20 * MIB, "cpu": 32 * MIB}
HEAP_KEPT = {"cuda": 0, "cpu": 32 * MIB}  # freed activations that the heap keeps at most: twice M_TRIM_THRESHOLD
# On a CPU, oneDNN's for a draft's shapes and every count of verified tokens, where matrices are, or become, bf16.
DRAFT_KERNELS = 30 * MIB
# On a GPU every layer's cache is cut out of free blocks, whose rests the next large vectors do not fit: share of the
# prefill's activations, and as much again of it as a preallocated cache holds of the bytes of one in full precision.
CUT_BLOCKS, CUT_BY_SLOTS = 0.10, 0.20
# What grows from chunk to chunk, a cache that is concatenated as well as the vectors of attention, leaves its outgrown
# blocks with the allocator: share of its last size.
GROWTH_SLACK = {"cuda": 0.30, "cpu": 0.05}
QUANTIZED_GROWTH_SLACK = 0.5  # on a CPU: expanded for each pass, and quantized again beside that

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
_DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_DTYPE_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
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


class PlanError(ValueError):
    """A model folder that cannot be planned for; the message names it and what mends it."""


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
    """All that `predict` knows of a model. Counts are elements; `stored` counts are bytes in the checkpoint."""

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
        """What `_model_bytes` counted already: a space asks for the same few again and again."""
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


def check_folder(folder: Path) -> None:
    """Raises PlanError unless the folder holds a config.json and whole safetensors files (headers only are read)."""
    _read_config(folder)
    if _tensors(folder):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        mend = "save the model again with save_pretrained, which writes safetensors"
        raise PlanError(f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; {mend}")
    raise PlanError(f"no {SINGLE} and no {INDEX} in {folder}; download the model's weights into it")


def read_shape(folder: Path) -> ModelShape:
    """The model's shape, from its tensors' headers or else its family's formulas.

    A `text_config` is followed. Raises PlanError (a ValueError) for a folder or family that cannot be read.
    """
    whole = _read_config(folder)
    text = whole.get("text_config")
    config = {**whole, **_without_none(text)} if isinstance(text, dict) else whole
    tensors = _tensors(folder)
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


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PlanError(f"the folder {folder} does not exist; give the folder of a downloaded model")
    if not (folder / CONFIG).is_file():
        raise PlanError(f"no {CONFIG} in {folder}; give the folder of a Hugging Face model")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON ({error}); download it again") from error
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} does not hold a JSON object; download it again")
    return data


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    stored: int


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of the checkpoint by name; empty where the folder has no safetensors."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        return {}
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
        raise PlanError(f"{folder / INDEX} has no weight_map of file names; download it again")
    tensors: dict[str, _Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= _header(folder / shard)
    if missing := shards.keys() - tensors.keys():
        raise PlanError(f"{folder / INDEX} names '{min(missing)}', which no shard holds; download the model again")
    return tensors


def _header(path: Path) -> dict[str, _Tensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise PlanError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); download it again") from error
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise PlanError(f"{path} has a damaged safetensors header ({error}); download it again") from error
    if 8 + length + end > size:
        raise PlanError(f"{path} is truncated: it holds {size:,} of {8 + length + end:,} bytes; download it again")
    return tensors


def _tensor(entry: dict[str, Any]) -> _Tensor:
    begin, end = entry["data_offsets"]
    shape, bits = tuple(entry["shape"]), _DTYPE_BITS.get(entry["dtype"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError("a shape or an offset is not a size")
    if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError("a tensor's shape and its bytes differ")
    return _Tensor(shape, entry["dtype"], end - begin)


def _held(tensors: Mapping[str, _Tensor], packing: Packing) -> dict[str, _Tensor]:
    """The tensors at the sizes that they are held at, each packed layer's as one weight; the others are held in bf16.

    A packed layer keeps its codes and, per group of at most QUANTO_GROUP inputs, a scale and a zero in bf16.
    """
    held: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight" and len(tensor.shape) == 2 and 0 not in tensor.shape:
            out, inp = packing.size(tensor.shape)
            groups = inp // min(packing.group(inp), QUANTO_GROUP)
            order = 4 * inp if packing.desc_act else 0
            # not named as a plain weight: a packed lm_head is one of the matrices
            held[f"{layer}.packed.weight"] = _Tensor((out, inp), "PACKED", tensor.stored + 4 * groups * out + order)
        elif part not in PARTS or f"{layer}.qweight" not in tensors:
            held[name] = tensor._replace(stored=2 * math.prod(tensor.shape))
    return held


def _first(config: Mapping[str, Any], *names: str) -> int:
    value = next((config[name] for name in names if name in config), None)
    if type(value) is not int or value < 1:
        raise KeyError(names[0])
    return value


def _shape(model_type: str, config: dict[str, Any], tensors: Mapping[str, _Tensor]) -> ModelShape:
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


def _sort_tensors(tensors: Mapping[str, _Tensor], count: int) -> tuple[list[LayerShape], int, int]:
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


@dataclass(frozen=True)
class Calibration:
    """What the process holds before any weight, and what measurement added to the formulas.

    To what the formulas say are added the `share` of cache and activations that they missed, the same for all, and by
    words of the configuration (see `_keys`) an offset in bytes; the sum is raised by a share of itself, which covers
    every record and the `SPREAD` of the next one. `corrections` holds those two. `error` is the relative error of
    `total` (95th percentile) on records that were left out of the fit; None where there were none.
    """

    base_bytes: int
    share: float = 0.0
    corrections: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: float | None = None


DEFAULT = {"cuda": Calibration(610 * MIB), "cpu": Calibration(380 * MIB)}  # a CUDA context; Python with torch


@dataclass(frozen=True)
class Prediction:
    """Bytes on the device by owner, bytes on the host, and the floor of one decode step in seconds.

    With speculation the floor is that of one verification, without the drafting.
    """

    owners: dict[str, int]
    host_bytes: int
    kv_bytes_per_token: int
    decode_floor_s: float | None = None

    @property
    def total(self) -> int:
        return sum(self.owners.values())


def predict(
    target: ModelShape,
    draft: ModelShape | None,
    configuration: Configuration,
    context: int,
    new_tokens: int,
    device: str,
    calibration: Calibration,
    bandwidth: float | None = None,
) -> Prediction:
    """The footprint at `context` prompt tokens and `new_tokens` more; `bandwidth` is the memory's, bytes per second."""
    if configuration.has_draft_model and draft is None:
        raise PlanError(f"the shape of the draft {configuration.draft} is needed; give its folder")
    c, kind, tokens = configuration, device.partition(":")[0], context + new_tokens + configuration.depth
    weights, head, embeddings, host = _model_bytes(target, c.weights, c.lm_head, c.embeddings)
    held = _kv_by_layer(target, c, tokens, c.weights)
    kv = sum(sorted(held)[-2:]) if c.cache == "offloaded" else sum(held)  # one layer in use, the next on its way
    drafted = draft_kv = 0
    if draft is not None and c.has_draft_model:
        *resident, on_host = _model_bytes(draft, c.draft_weights, draft_head(c.draft_weights, kind), c.embeddings)
        drafted, host = sum(resident), host + on_host
        draft_kv = sum(_kv_by_layer(draft, c, tokens, c.draft_weights))
    prefill = _prefill_bytes(target, c, context, tokens, kind)
    activations = _activations(target, draft, c, context, tokens, prefill, kv, draft_kv, kind)
    slack = FRAGMENTS[kind] + _slack(target, c, context, tokens, prefill, activations, kv, draft_kv, kind)
    base = calibration.base_bytes + KERNELS[kind] + (INT8_KERNELS if (c.weights, kind) == ("bnb-int8", "cuda") else 0)
    fixed = base + weights + head + embeddings + drafted + kv + draft_kv
    said = _corrected(calibration, _keys(c), fixed + activations + slack, kv + draft_kv + activations)
    movable = max(0, round(said) - fixed)  # a negative correction takes from these two
    activations = min(activations, movable)
    owners = {
        "base": base,
        "weights": weights,
        "lm_head": head,
        "embeddings": embeddings,
        "draft": drafted,
        "kv_cache": kv,
        "draft_kv_cache": draft_kv,
        "activations": activations,
        "slack": movable - activations,
    }
    floor = (weights + head + sum(held)) / bandwidth if bandwidth else None
    per_token = sum(layer.kv_elements for layer in target.layers) * _cache_element(target, c.cache, c.weights)
    return Prediction(owners, host + sum(held) - kv, round(per_token), floor)


def _element(shape: ModelShape, weights: str) -> int:
    """Bytes of an unquantized element: norms, activations and full-precision cache."""
    return {"fp32": 4, "checkpoint": shape.element_bytes}.get(weights, 2)


def _matrix_bytes(word: str, linear: Linear, element: int) -> int:
    """A matrix as `word` stores it, with its scales."""
    elements = linear.out * linear.inp
    match word:
        case "bnb-nf4" | "bnb-fp4" | "nf4":
            blocks = -(-elements // BNB_BLOCK)
            return -(-elements // 2) + blocks + 4 * -(-blocks // BNB_NESTED_BLOCK) + BNB_TABLES
        case "bnb-int8":
            return elements + 4 * linear.out
        case "quanto-int8" | "int8":
            return elements + element * linear.out
        case "quanto-int4" | "int4":
            return -(-elements // 2) + 2 * element * elements // quanto_group(linear.inp)
        case "checkpoint":
            return linear.stored
    return element * elements


def quanto_group(inp: int) -> int:
    """Elements that share a scale and a shift in quanto's qint4: the whole row where no group divides it."""
    return next((g for g in range(QUANTO_GROUP, 31, -32) if inp > QUANTO_GROUP and inp % g == 0), inp)


def _block_bytes(block: LayerShape, word: str, element: int) -> int:
    other = block.other_stored if word == "checkpoint" else block.other * element
    return other + sum(_matrix_bytes(word, linear, element) for linear in block.linears)


def _model_bytes(shape: ModelShape, weights: str, lm_head: str, embeddings: str) -> tuple[int, int, int, int]:
    """Linears with norms, lm_head and embeddings on the device; embeddings on the host.

    A tied lm_head that is stored as the embedding is counts once, as lm_head.
    """
    known = shape.sizes.get((weights, lm_head, embeddings))
    if known is None:
        known = shape.sizes[weights, lm_head, embeddings] = _counted_bytes(shape, weights, lm_head, embeddings)
    return known


def _counted_bytes(shape: ModelShape, weights: str, lm_head: str, embeddings: str) -> tuple[int, int, int, int]:
    if weights == "checkpoint" and shape.prequantized and not shape.exact:
        raise PlanError(f"a quantized {shape.model_type} checkpoint needs its safetensors to be sized; download them")
    element = _element(shape, weights)
    blocks = sum(_block_bytes(block, weights, element) for block in (*shape.layers, shape.rest))
    embedding = shape.embedding_elements * element
    rows = Linear("lm_head", shape.lm_head_elements // shape.hidden_size, shape.hidden_size, 0)
    head = _matrix_bytes(lm_head, rows, 4 if lm_head == "fp32" else element)
    if embeddings == "host":
        return blocks, head, 0, embedding
    shared = shape.tied and head == rows.out * rows.inp * element
    return blocks, head, embedding - head if shared else embedding, 0


def _kv_by_layer(shape: ModelShape, c: Configuration, tokens: int, weights: str) -> list[int]:
    """Each layer's keys and values, at `tokens` with the deepest speculation; the draft's cache is as the target's."""
    return [_kv_bytes(shape, layer, c, tokens, weights) for layer in shape.layers]


def _kv_bytes(shape: ModelShape, layer: LayerShape, c: Configuration, tokens: int, weights: str) -> int:
    element = _element(shape, weights)
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
    return round(layer.kv_elements * (slots * _cache_element(shape, c.cache, weights) + recent))


def _cache_element(shape: ModelShape, cache: str, weights: str) -> float:
    """Bytes of a cached element, with its share of scales and minima."""
    match cache:
        case "quantized-8" | "quantized-4" | "quantized-2":
            channels = math.gcd(CACHE_GROUP, shape.head_dim)
            return int(cache[-1]) / 8 + CACHE_SCALE / CACHE_GROUP + CACHE_SCALE / channels
        case "quantized-fp8":
            return 1 + CACHE_SCALE / shape.head_dim
    return _element(shape, weights)


def _activations(
    target: ModelShape,
    draft: ModelShape | None,
    c: Configuration,
    context: int,
    tokens: int,
    prefill: int,
    kv: int,
    draft_kv: int,
    kind: str,
) -> int:
    """The transient peak beside both caches: loading, before which there are none, a prefill or decode.

    The draft's cache is made after the target's prefill, unless recorded steps keep it from the request before; and
    a recorded step has a pool of its own beside all other passes. Steps of several depths share it, but each keeps its
    logits.
    """
    load = LOAD_COPIES.get(c.weights, 0) * target.largest_linear * 2
    if (c.weights, kind) == ("quanto-int4", "cuda"):
        load = QUANTIZING_BYTES * min(UNPACKED, target.largest_linear)
    load -= kv + draft_kv
    reads = c.attention != "split_kv"  # which takes the cache as it is stored, but for prompts, which sdpa feeds
    decode = _pass_bytes(target, c, c.depth + 1, tokens, reads, c.depth + 1, kind)
    drafts = 0
    if draft is not None and c.has_draft_model:
        drafts = _prefill_bytes(
            draft, c.replace(weights=c.draft_weights, lm_head=draft_head(c.draft_weights, kind)), context, tokens, kind
        )
    if c.launch == "eager":
        return max(load, prefill - draft_kv, drafts, decode) + WORKSPACE[kind]
    kept = sum(depth + 1 for depth in c.depths[:-1]) * target.vocab_size * _element(target, c.weights)
    return max(load, prefill, drafts) + decode + kept + WORKSPACE[kind]


def _slack(
    target: ModelShape,
    c: Configuration,
    context: int,
    tokens: int,
    prefill: int,
    activations: int,
    kv: int,
    draft_kv: int,
    kind: str,
) -> int:
    """What the allocator or the heap holds beside everything that is in use."""
    grows = c.cache in ("dynamic", "sliding", "offloaded")
    if kind == "cuda":
        whole = not c.prefill_chunk or c.prefill_chunk >= context
        slots = 0.0 if grows else _cache_element(target, c.cache, c.weights) / _element(target, c.weights)
        cut = (CUT_BLOCKS + CUT_BY_SLOTS * slots) * prefill
        expanded = _expanded_bytes(target, c.weights, min(c.prefill_chunk or context, context), kind)
        vector = min(c.prefill_chunk or context, context) * target.intermediate_size * _element(target, c.weights)
        if vector > expanded:  # else the intermediate vectors lie where the matrix was
            cut += expanded * (1 if _merged(target, c.weights, kind) else 2)
        outgrown = 0 if whole else prefill + (kv + draft_kv if grows else 0)
        cut += RECORDED_POOL if c.launch != "eager" else 0
        return round(cut + GROWTH_SLACK[kind] * outgrown)
    slack = min(HEAP_KEPT[kind], activations)
    slack += DRAFT_KERNELS if c.has_draft_model and c.weights in ("bf16", "fp32", "quanto-int4") else 0
    if grows:
        return slack + round(GROWTH_SLACK[kind] * (kv + draft_kv))
    if c.cache == "static":
        return slack
    full = sum(_kv_by_layer(target, c.replace(cache="dynamic"), tokens, c.weights))
    return slack + round(QUANTIZED_GROWTH_SLACK * full + GROWTH_SLACK[kind] * draft_kv)


def _prefill_bytes(shape: ModelShape, c: Configuration, context: int, tokens: int, kind: str) -> int:
    chunk = min(c.prefill_chunk or context, context)
    keys = tokens if c.cache == "static" and chunk < context else context
    return _pass_bytes(shape, c, chunk, keys, chunk < context, 1, kind)


def _pass_bytes(
    shape: ModelShape, c: Configuration, queries: int, keys: int, past: bool, logits: int, kind: str
) -> int:
    """The peak of one forward pass of `queries` tokens over `keys` cached tokens."""
    element = _element(shape, c.weights)
    hidden = queries * (HIDDEN_COPIES * shape.hidden_size + ROTARY * shape.head_dim) * element
    head = logits * shape.vocab_size * (element + LOGIT_BYTES)
    if c.lm_head in DEQUANTIZED_FROM and MULTIPLIED_ON.get(c.lm_head) != kind:
        head += (logits >= DEQUANTIZED_FROM[c.lm_head]) * shape.lm_head_elements * element
    mlp = _mlp_bytes(shape, c.weights, queries, element, kind)
    return hidden + max(head, mlp, _attention_bytes(shape, c, queries, keys, past, kind))


def _mlp_bytes(shape: ModelShape, weights: str, queries: int, element: int, kind: str) -> int:
    """Intermediate vectors; or those of a product (gate and up may be one) with what it needs besides."""
    vector = queries * shape.intermediate_size * element
    merged = _merged(shape, weights, kind)
    copies = 4 if merged else shape.mlp_copies
    workspace = _expanded_bytes(shape, weights, queries, kind)
    if weights == "bnb-int8":
        workspace = queries * (shape.intermediate_size * INT8_PRODUCT_BYTES[kind] + shape.hidden_size) + vector
    return max(copies * vector, (2 if merged else copies - 1) * vector + workspace)


def _merged(shape: ModelShape, weights: str, kind: str) -> bool:
    return kind == "cuda" and weights in MERGED and shape.gate_and_up > 0


def _expanded_bytes(shape: ModelShape, weights: str, queries: int, kind: str) -> int:
    """The largest matrix in full precision, where a product of so many tokens begins with that."""
    if queries < DEQUANTIZED_FROM.get(weights, queries + 1) or (weights == "quanto-int8" and kind == "cpu"):
        return 0  # a CPU multiplies int8
    if weights == "quanto-int4":
        return UNPACKED * _element(shape, weights) if kind == "cuda" else 0
    elements = shape.gate_and_up if _merged(shape, weights, kind) else shape.largest_linear
    scales = 2 * 4 * elements // BNB_BLOCK if weights in ("bnb-nf4", "bnb-fp4") else 0  # float32, and once more
    return elements * _element(shape, weights) + scales


def _attention_bytes(shape: ModelShape, c: Configuration, queries: int, keys: int, past: bool, kind: str) -> int:
    """Masks, heads repeated for kernels without grouped queries, eager scores, and the cache as it is read."""
    element, grouped = _element(shape, c.weights), shape.heads != shape.kv_heads
    layer = 2 * shape.kv_heads * shape.head_dim * keys * element
    repeated = 2 * shape.heads * shape.head_dim * keys * element if grouped else 0
    pairs = queries * keys
    sliding = any(block.window and keys > block.window for block in shape.layers)
    quantized = past and c.cache.startswith("quantized")
    flash = kind == "cuda" and element == 2
    if c.attention == "split_kv":  # a few KV heads at a time; the codes' bytes are apart before they are dequantized
        masked = queries > 1 and (sliding or (past and not flash))
        copied = (layer if quantized else 0) + (repeated if masked else 0)
        most = max(COPIED, COPIED_BY_QUERIES * queries * shape.heads * shape.head_dim * element)
        copied = min(copied, max(most, copied // shape.kv_heads))
        return masked * pairs * (MASK_BYTES + element) + copied * (3 if quantized else 2) // 2
    unfused = c.attention == "sdpa" and kind == "cuda" and element == 4 and grouped  # flash has no float32
    needed = 0
    if c.attention == "eager" or (unfused and queries > 1):
        needed = shape.heads * pairs * (2 * element + SCORE_BYTES) + pairs * element + repeated
    elif c.attention == "sdpa" and queries > 1 and (past or sliding):
        needed = pairs * (MASK_BYTES + element) + repeated
    if quantized:
        return needed + layer  # expanded for the pass
    return max(needed, layer // 2 if past and c.cache != "static" else 0)  # new keys beside the old, then the values


# How far above all records of its kind, as a share of itself, the next may lie: a heap varies more than CUDA's pool.
SPREAD = {"cuda": 0.005, "cpu": 0.01}
_COMPLETED = ("ok", "quality_loss", "wrong_output", "unstable")  # their peaks were not cut short


def calibrate(pairs: Iterable[tuple[Record, Prediction]], device: str) -> Calibration:
    """Learns corrections from records and what `predict` said of them with `DEFAULT`, all of one machine and workload.

    Afterwards no record's prediction is below its measured peak. Records that failed are not used.
    """
    kind = device.partition(":")[0]
    kept = [_point(r, p) for r, p in pairs if r.outcome in _COMPLETED and r.peak_bytes]
    fitted = _fit(kept, kind)
    errors = []
    for i, point in enumerate(kept if len(kept) > 1 else ()):
        others = _fit(kept[:i] + kept[i + 1 :], kind, point.keys)
        whole = point.predicted + others.base_bytes - DEFAULT[kind].base_bytes
        errors.append(abs(_corrected(others, point.keys, whole, point.moving) / point.peak - 1))
    return dataclasses.replace(fitted, error=_high(errors) if errors else None)


class _Point(NamedTuple):
    """A record beside what was predicted of it, in bytes."""

    keys: tuple[str, ...]
    moving: int
    predicted: int
    peak: int
    base: int  # 0 where it was not measured


def _point(record: Record, prediction: Prediction) -> _Point:
    keys, moving = _keys(record.configuration), _moving(prediction)
    return _Point(keys, moving, prediction.total, record.peak_bytes or 0, record.base_bytes or 0)


def _keys(configuration: Configuration) -> tuple[str, ...]:
    """The words that a correction is kept under, the most specific first; the last stands for all configurations."""
    c = configuration
    return f"{c.weights} {c.launch}{' draft' if c.has_draft_model else ''}", c.weights, ""


def _moving(prediction: Prediction) -> int:
    return sum(prediction.owners[owner] for owner in ("kv_cache", "draft_kv_cache", "activations"))


def _fit(points: Sequence[_Point], kind: str, wanted: tuple[str, ...] | None = None) -> Calibration:
    """Without the error; only the corrections under the `wanted` keys where those are given."""
    default = DEFAULT[kind].base_bytes
    base = max((point.base for point in points if point.base), default=default)
    kinds: dict[str, list[tuple[int, int, int]]] = {}  # the moving bytes, the whole prediction and the truth
    for point in points:
        figures = point.moving, point.predicted + base - default, point.peak
        for key in point.keys:
            if " " in key or wanted is None or key in wanted:
                kinds.setdefault(key, []).append(figures)
    share = _common_share([like for key, like in kinds.items() if " " in key])
    corrections = {}
    for key, like in kinds.items():
        if wanted is None or key in wanted:
            offset = sum(peak - said - share * moving for moving, said, peak in like) / len(like)
            above = max(peak / max(1.0, said + share * moving + offset) for moving, said, peak in like)
            corrections[key] = offset, above - 1 + SPREAD[kind]
    return Calibration(base, share, corrections)


def _common_share(kinds: Sequence[Sequence[tuple[int, int, int]]]) -> float:
    """The slope of what was missed over the moving bytes: least squares with an offset for every kind."""
    products = squares = 0.0
    for points in kinds:
        mean = sum(moving for moving, _, _ in points) / len(points)
        products += sum((moving - mean) * (peak - said) for moving, said, peak in points)
        squares += sum((moving - mean) ** 2 for moving, _, _ in points)
    return min(max(products / squares, -0.5), 1.0) if squares else 0.0  # predictions keep rising with the context


def _high(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def _corrected(calibration: Calibration, keys: tuple[str, ...], said: int, moving: int) -> float:
    offset, above = next((calibration.corrections[key] for key in keys if key in calibration.corrections), (0.0, 0.0))
    return (said + calibration.share * moving + offset) * (1 + above)


def largest_context(
    target: ModelShape,
    draft: ModelShape | None,
    configuration: Configuration,
    new_tokens: int,
    budget: Budget,
    calibration: Calibration,
) -> int:
    """The longest prompt (tokens) whose footprint fits the budget and the model's positions; 0 where none does."""

    def fits(context: int) -> bool:
        found = predict(target, draft, configuration, context, new_tokens, budget.device, calibration)
        return found.total <= budget.bytes

    low, high = 0, (target.max_position_embeddings or 2**20) - new_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return max(low, 0)


class LayerRow(NamedTuple):
    """One layer's bytes, wherever they are held."""

    layer: int
    weights_bytes: int
    kv_bytes: int


def by_layer(target: ModelShape, configuration: Configuration, context: int, new_tokens: int) -> list[LayerRow]:
    """A row per decoder layer of the target."""
    c, element = configuration, _element(target, configuration.weights)
    held = _kv_by_layer(target, c, context + new_tokens + c.depth, c.weights)
    return [
        LayerRow(i, _block_bytes(layer, c.weights, element), kv_bytes)
        for i, (layer, kv_bytes) in enumerate(zip(target.layers, held, strict=True))
    ]


def cheapest(
    target: ModelShape,
    drafts: Mapping[str, ModelShape],
    configurations: Iterable[Configuration],
    contexts: Sequence[int],
    new_tokens: int,
    device: str,
    calibration: Calibration,
) -> tuple[Configuration, int, Prediction]:
    """The smallest footprint among configurations and contexts; `drafts` maps a configuration's draft to its shape."""

    candidates = (
        (c, context, predict(target, drafts.get(c.draft), c, context, new_tokens, device, calibration))
        for c in configurations
        for context in contexts
    )
    return min(candidates, key=lambda candidate: candidate[2].total)
