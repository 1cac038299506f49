"""Decode attention that reads the cache as it is stored: `attention = split_kv`.

A decode step has so few queries that its attention is bound by reading the cache, and so little other parallelism that
one program per head leaves the GPU idle. So the tokens that the cache holds are split over many programs per KV head,
each keeps a running softmax (Milakov and Gimelshein, arXiv 1805.02867), and a second kernel combines their results by
their log-sum-exp, as in Flash-Decoding (Dao et al., 2023). All queries that share a KV head, of every new token, are
the rows of one matrix product, so that grouped-query attention reads each key once. Groups are dequantized in
registers; the lengths are read from device tensors, so a recorded step never touches a slot that holds nothing.

This works where Triton does (on a processor only in its interpreter, for tests). A prompt goes through PyTorch's own
flash attention: a chunk whose queries are the newest tokens needs no mask there (its causal mask is aligned at the last
token) and no keys and values repeated for the heads that share them. Where flash does not fit, it goes through sdpa.
Keys and values that are stored quantized are dequantized for it a few KV heads at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..model.activations import COPIED, COPIED_BY_QUERIES
from .cache import GROUP, Float8Layer, QuantizedLayer, StaticLayer, layers_of
from .support import Unsupported

WORD = "split_kv"  # the knob's word, and transformers'
# Measured on an H200 by benchmarks/attention_speed.py (benchmarks/LOG.md, "Attention over the 4-bit cache" and "Tried
# and lost"); other GPUs were not asked.
PROGRAMS = 256  # of a launch: about two for each multiprocessor; 128 and 512 lost on 4 bits
LONG = 8192  # slots of a 4-bit cache beyond which each warp gets blocks of its own: it won at 16k and lost at 2k and 4k
LONG_PROGRAMS = 128  # of a launch then, for every ROWS query rows: one a multiprocessor; 64 and 256 lost
ROWS, WARPS, STAGES = 16, 4, 3  # query rows, warps and pipeline stages of such a program; 32, 2 and 8, 2 and 4 lost
OVERLAP = True  # the combining kernel is launched before the reading one has ended: 360 tokens/s at 16k, 357 without

WIDE = 128  # channels of a head beyond which a launch takes WIDE_ROWS query rows at most
WIDE_ROWS = 64  # as 128 of 256 channels do not fit a Hopper's shared memory
LOG2_E = 1.4426950408889634  # the kernels take powers of 2 where softmax takes those of e
FULL, FLOAT8 = 0, 16  # the kernels' words for a layer's storage; the others are bits per stored value


def register_split_kv(device: str) -> None:
    """Let models that are loaded afterwards use it. Raises Unsupported where Triton's kernels cannot run."""
    if device == "cpu":
        raise Unsupported(f"attention = {WORD} needs a GPU")
    try:
        from . import kernels  # noqa: F401
    except ImportError as error:
        raise Unsupported(f"attention = {WORD} needs Triton: {error}") from error
    register()


def register() -> None:
    """Make transformers know the word."""
    AttentionInterface.register(WORD, _attention)
    AttentionMaskInterface.register(WORD, _mask)


def bind(model: PreTrainedModel, cache: Cache | None) -> None:
    """Tell the model's attention modules which cache their recorded steps read; None lets go of it."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise Unsupported(f"attention = {WORD} has no soft-capping of scores, which {text.model_type} needs")
    for layer in [] if cache is None else layers_of(cache):
        layer.by_heads = True
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            module.kv_layer = None if cache is None else cache.layers[index]  # type: ignore[assignment]


def _mask(*args: Any, q_offset: int | torch.Tensor = 0, **kwargs: Any) -> torch.Tensor | None:
    if isinstance(q_offset, torch.Tensor):  # a recorded step: the kernel knows what is causal
        return None
    if q_offset and _flash_needs_no_mask(q_offset, **kwargs):
        return None
    return sdpa_mask(*args, q_offset=q_offset, **kwargs)  # type: ignore[misc] # `args` end before it


def _flash_needs_no_mask(
    q_offset: int,
    *,
    q_length: int,
    kv_length: int,
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> bool:
    """Whether the queries are the newest tokens, each sees all before it, and flash attention takes such tensors."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    causal = mask_function is causal_mask_function and attention_mask is None
    fits = dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and dim <= 256
    return causal and fits and torch.device(device).type == "cuda" and kv_offset == 0 == kv_length - q_offset - q_length


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if s_aux is not None:
        raise Unsupported(f"attention = {WORD} has no attention sinks, which this model needs")
    layer: Any = getattr(module, "kv_layer", None)
    if layer is not None and not layer.is_initialized:
        raise Unsupported(f"attention = {WORD} cannot read the keys and values of another layer, as this model does")
    if layer is None or layer.lengths is None:
        return _prompt_attention(module, query, key, value, attention_mask, scaling, layer, **kwargs), None
    return decode_attention(query, layer, scaling, sliding_window), None


def _prompt_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    layer: StaticLayer | QuantizedLayer | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """PyTorch's own attention, a few KV heads at a time where their keys and values have to be copied for it.

    That is so where the layer stores tokens quantized, before those given, and where a mask keeps PyTorch from sharing
    KV heads. Returns [1, n, heads, head_dim].
    """
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    older = layer.older if isinstance(layer, QuantizedLayer) else 0
    tokens = older + key.shape[2]
    copies = (older > 0) + (group if mask is not None and group > 1 else 0)
    head = tokens * (key.shape[3] + value.shape[3]) * key.element_size()
    most = max(COPIED, COPIED_BY_QUERIES * query.numel() * query.element_size())
    step = max(1, most // (copies * head)) if copies else kv_heads
    parts = []
    for begin in range(0, kv_heads, step):
        heads = slice(begin, begin + step)
        sharing = slice(begin * group, (begin + step) * group)
        if isinstance(layer, QuantizedLayer):
            keys, values = layer.read(key, value, older, heads)
        else:
            keys, values = key[:, heads], value[:, heads]
        if mask is None and 1 < query.shape[2] < tokens:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            part = flash(query[:, sharing], keys, values, is_causal=True, scale=scale)[0].transpose(1, 2)
        else:
            own = mask if mask is None or mask.shape[1] == 1 else mask[:, sharing]
            part = sdpa_attention_forward(module, query[:, sharing], keys, values, own, scaling=scaling, **kwargs)[0]
        parts.append(part)
        del keys, values  # before the next are made
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def decode_attention(
    query: torch.Tensor, layer: StaticLayer | QuantizedLayer, scaling: float | None = None, window: int | None = None
) -> torch.Tensor:
    """Attention of `query` [1, heads, n, head_dim], the newest n tokens, over what the layer holds with them.

    The layer's `lengths` say how many tokens it held before. Returns [1, n, heads, head_dim].
    """
    assert layer.lengths is not None
    assert layer.keys is not None
    assert layer.values is not None
    if layer.keys.shape[-1] != layer.values.shape[-1]:
        raise Unsupported(f"attention = {WORD} needs keys and values of one size")
    stored: tuple[torch.Tensor | None, ...] = (None,) * 4
    kind = FULL
    if isinstance(layer, Float8Layer):
        stored = (layer.key_codes, layer.value_codes, layer.key_scale, layer.value_scale)
        kind = FLOAT8
    elif isinstance(layer, QuantizedLayer):
        stored = (layer.key_codes, layer.value_codes, layer.key_ranges, layer.value_ranges)
        kind = layer.bits
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = layer.lengths
    group = query.shape[1] // layer.keys.shape[1]
    each = query.shape[2] if query.shape[3] <= WIDE else max(1, WIDE_ROWS // group)
    parts = []
    for begin in range(0, query.shape[2], each):
        held = lengths.tokens + begin if begin else lengths.tokens  # no launch for what is nearly always one part
        lengths_and_words = (held, lengths.stored, scale, window or 0, kind)
        queries = query[:, :, begin : begin + each]
        parts.append(_split_kv(queries, layer.keys, layer.values, *stored, *lengths_and_words))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@torch.library.custom_op("autotune::split_kv", mutates_args=())
def _split_kv(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_codes: torch.Tensor | None,
    value_codes: torch.Tensor | None,
    key_ranges: torch.Tensor | None,
    value_ranges: torch.Tensor | None,
    tokens: torch.Tensor,
    stored: torch.Tensor,
    scale: float,
    window: int,
    kind: int,
) -> torch.Tensor:
    from . import kernels

    _, heads, count, dim = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    rows = max(16, _padded(count * group))
    value_groups = 1 if kind in (FULL, FLOAT8) or value_ranges is None else value_ranges.shape[2]
    halves = kind == 4 and value_groups <= 2
    padded = max(32 if halves else 16, _padded(dim))  # a product takes 16 channels at least
    capacity = 0 if key_codes is None else key_codes.shape[2]
    long = halves and capacity > LONG and dim % 4 == 0
    each = min(rows, ROWS) if long else rows
    splits = max(1, (LONG_PROGRAMS if long else PROGRAMS) // kv_heads)
    parts = splits if kind == FULL else splits + 1  # the last part is the full-precision window
    query = query if query.stride(-1) == 1 else query.contiguous()
    partial = query.new_empty((kv_heads, parts, rows, padded), dtype=torch.float32)
    statistics = query.new_empty((2, kv_heads, parts, rows), dtype=torch.float32)
    output = query.new_empty((1, count, heads, dim))
    if kind == FLOAT8:
        assert key_codes is not None
        assert value_codes is not None
        key_codes, value_codes = key_codes.view(torch.uint8), value_codes.view(torch.uint8)
    early = OVERLAP and _can_overlap(query.device)
    shape = {"COUNT": count, "HEADS_PER_KV": group, "DIM": dim, "PADDED": padded, "PARTS": parts, "ROWS": rows}
    with torch.cuda.device_of(query):
        states = (query, keys, values)
        sizes = (scale * LOG2_E, query.stride(1), query.stride(2), slots, capacity)
        others = (tokens, stored, partial, statistics, *sizes)
        words: dict[str, Any] = {**shape, "SLIDING": window, "BLOCK": GROUP, "EARLY": early}
        if halves:
            assert key_ranges is not None
            assert value_ranges is not None
            assert key_codes is not None
            assert value_codes is not None
            bfloat = key_ranges.dtype == torch.bfloat16
            words |= {"VALUE_GROUPS": value_groups, "BFLOAT": bfloat}
            ranges = (key_ranges.view(torch.int32), value_ranges.view(torch.int32))
            if long:
                fast = query.is_cuda and bfloat and query.dtype == torch.bfloat16
                words |= {"EACH": each, "WARPS": WARPS, "ASM": kernels.CODE_ASSEMBLY if fast else None}
                words |= {"num_warps": WARPS, "num_stages": STAGES}
                codes = (key_codes.view(torch.int16), value_codes.view(torch.int16))
                kernels.part_int4_long[(kv_heads, parts, rows // each)](*states, *codes, *ranges, *others, **words)
            else:
                kernels.part_int4[(kv_heads, parts)](*states, key_codes, value_codes, *ranges, *others, **words)
        else:
            words |= {"KIND": kind, "VALUE_GROUP": dim // value_groups}
            codes_and_ranges = (key_codes, value_codes, key_ranges, value_ranges)
            kernels.part[(kv_heads, parts)](*states, *codes_and_ranges, *others, **words)
        words = {**shape, "PARTS_PADDED": _padded(parts), "EARLY": early}
        if early:
            words["launch_pdl"] = True
        kernels.combine[(kv_heads, count * group)](partial, statistics, output, **words)
    return output


def _padded(count: int) -> int:
    """The next power of 2, which is what a kernel's tensors take."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether Triton and the GPU know programmatic dependent launch."""
    from . import kernels

    known = kernels.OVERLAPS and device.type == "cuda"
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@_split_kv.register_fake
def _(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    _, heads, count, dim = query.shape
    return query.new_empty((1, count, heads, dim))
