# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
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
import triton
import triton.language as tl
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..model.activations import COPIED, COPIED_BY_QUERIES
from .cache import GROUP, Float8Layer, QuantizedLayer, StaticLayer, layers
from .support import Unsupported

WORD = "split_kv"
PROGRAMS = 256  # about two for each multiprocessor of a large GPU
LONG = 8192  # slots of a 4-bit cache beyond which each warp gets blocks of its own, and a multiprocessor one program
LONG_PROGRAMS, ROWS, WARPS, STAGES = 128, 16, 4, 3  # for every 16 query rows; warps of a program, and its pipeline
OVERLAP = True  # the combining kernel is launched before the kernel before it has ended, and waits on the device
FULL, FLOAT8 = 0, 16  # the kernel's words for a layer's storage; the others are bits per stored value


def register() -> None:
    """Make transformers know the word, for models that are loaded afterwards."""
    AttentionInterface.register(WORD, _attention)
    AttentionMaskInterface.register(WORD, _mask)


def bind(model: PreTrainedModel, cache: Cache | None) -> None:
    """Tell the model's attention modules which cache their recorded steps read; None lets go of it."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise Unsupported(f"attention = {WORD} has no soft-capping of scores, which {text.model_type} needs")
    for layer in [] if cache is None else layers(cache):
        layer.by_heads = True
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            module.kv_layer = None if cache is None else layers(cache)[index]  # type: ignore[assignment]


def _mask(*args: Any, q_offset: int | torch.Tensor = 0, **kwargs: Any) -> torch.Tensor | None:
    if isinstance(q_offset, torch.Tensor):  # a recorded step: the kernel knows what is causal
        return None
    if q_offset and _flash_needs_no_mask(q_offset, **kwargs):
        return None
    return sdpa_mask(*args, q_offset=q_offset, **kwargs)


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
    lengths_and_words = (lengths.tokens, lengths.stored, scale, window or 0, kind)
    return _split_kv(query, layer.keys, layer.values, *stored, *lengths_and_words)  # type: ignore[no-any-return]


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
    _, heads, count, dim = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(count * group))
    value_groups = 1 if kind in (FULL, FLOAT8) or value_ranges is None else value_ranges.shape[2]
    halves = kind == 4 and value_groups <= 2
    padded = max(32 if halves else 16, triton.next_power_of_2(dim))  # a product takes 16 channels at least
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
        lengths = (tokens, stored, partial, statistics)
        sizes = (scale * 1.4426950408889634, query.stride(1), query.stride(2), slots, capacity)  # they take powers of 2
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
                words |= {"EACH": each, "WARPS": WARPS, "ASM": _ASM if fast else None}
                words |= {"num_warps": WARPS, "num_stages": STAGES}
                codes = (key_codes.view(torch.int16), value_codes.view(torch.int16))
                _part_int4_long[(kv_heads, parts, rows // each)](*states, *codes, *ranges, *lengths, *sizes, **words)
            else:
                _part_int4[(kv_heads, parts)](*states, key_codes, value_codes, *ranges, *lengths, *sizes, **words)
        else:
            words |= {"KIND": kind, "VALUE_GROUP": dim // value_groups}
            codes_and_ranges = (key_codes, value_codes, key_ranges, value_ranges)
            _part[(kv_heads, parts)](*states, *codes_and_ranges, *lengths, *sizes, **words)
        words = {**shape, "PARTS_PADDED": triton.next_power_of_2(parts), "EARLY": early}
        if early:
            words["launch_pdl"] = True
        _combine[(kv_heads, count * group)](partial, statistics, output, **words)
    return output


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether Triton and the GPU know programmatic dependent launch."""
    known = hasattr(tl.extra.cuda, "gdc_wait") and device.type == "cuda"
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@_split_kv.register_fake
def _(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    _, heads, count, dim = query.shape
    return query.new_empty((1, count, heads, dim))


@triton.jit
def _decoded(codes, position, channel, ok, DIM: tl.constexpr, BITS: tl.constexpr):
    """Stored codes of a tile, as float32: several channels share a byte."""
    packed: tl.constexpr = DIM * BITS // 8
    byte = tl.load(codes + position[:, None] * packed + (channel % packed)[None, :], mask=ok, other=0)
    return ((byte >> ((channel // packed) * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _float8(codes, scales, position, channel, ok, some, DIM: tl.constexpr):
    """float8 e4m3 from its bits, for GPUs that lack the type: as a float16 it is 2^8 times too small."""
    byte = tl.load(codes + position[:, None] * DIM + channel[None, :], mask=ok, other=0).to(tl.int16)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    scale = tl.load(scales + position, mask=some, other=0).to(tl.float32)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)[:, None]


@triton.jit
def _range(
    held,
    stored_ptr,
    part,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):
    """The positions that a part attends to, and the position of the first full-precision slot.

    They begin at a whole block, and are a multiple of SHARE for all parts but the last that has any.
    """
    first = held * 0  # the oldest position that any query sees
    if SLIDING > 0:
        first = tl.maximum(held - SLIDING + 1, 0)
    window_begin = held * 0  # the position of the first full-precision slot
    stop = held + COUNT
    parts: tl.constexpr = PARTS if KIND == 0 else PARTS - 1
    if KIND != 0:
        window_begin = tl.load(stored_ptr).to(tl.int32)
        stop = window_begin
    begin = first // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), SHARE), parts) * SHARE
    begin += part * each
    stop = tl.minimum(stop, begin + each)
    if KIND != 0:
        newest = part == PARTS - 1
        begin = tl.where(newest, tl.maximum(first // BLOCK * BLOCK, window_begin), begin)
        stop = tl.where(newest, held + COUNT, stop)
    return begin, stop, window_begin


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Let the combining kernel be launched already."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _part(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_ranges_ptr,
    value_ranges_ptr,
    tokens_ptr,
    stored_ptr,
    partial_ptr,
    statistics_ptr,
    scale,
    query_head_stride,
    query_token_stride,
    slots,
    capacity,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """One part of one KV head's tokens: the unnormalized result, its running maximum and its sum."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    kv_heads = tl.num_programs(0)
    _begin(EARLY)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token  # of each row's query
    used = row < COUNT * HEADS_PER_KV
    query_row = (head * HEADS_PER_KV + row % HEADS_PER_KV) * query_head_stride + token * query_token_stride
    query = tl.load(
        query_ptr + query_row[:, None] + channel[None, :], mask=used[:, None] & (channel < DIM)[None, :], other=0.0
    )

    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, KIND, SLIDING, BLOCK, BLOCK)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED], tl.float32)
    head = head.to(tl.int64)
    for start in range(begin, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        some = at < stop
        ok = some[:, None] & (channel < DIM)[None, :]
        recent = head * slots * DIM + (at - window_begin)[:, None] * DIM + channel[None, :]
        if KIND == 0:  # noqa: SIM114 - KIND is known when compiling, `part` is not
            key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            value = tl.load(values_ptr + recent, mask=ok, other=0.0)
        elif part == PARTS - 1:
            key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            value = tl.load(values_ptr + recent, mask=ok, other=0.0)
        elif KIND == 16:
            base = head * capacity
            key = _float8(key_codes_ptr + base * DIM, key_ranges_ptr + base, at, channel, ok, some, DIM)
            value = _float8(value_codes_ptr + base * DIM, value_ranges_ptr + base, at, channel, ok, some, DIM)
            key = key.to(query.dtype)
            value = value.to(query.dtype)
        else:
            packed: tl.constexpr = DIM * KIND // 8
            inside = channel < DIM
            range_ptr = key_ranges_ptr + 2 * ((head * (capacity // BLOCK) + start // BLOCK) * DIM + channel)
            key = _decoded(key_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            key_scale = tl.load(range_ptr, mask=inside, other=0.0).to(tl.float32)
            key_minimum = tl.load(range_ptr + 1, mask=inside, other=0.0).to(tl.float32)
            key = (key * key_scale[None, :] + key_minimum[None, :]).to(query.dtype)
            value = _decoded(value_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            value_group = head * (DIM // VALUE_GROUP) + channel // VALUE_GROUP
            range_2d = value_ranges_ptr + 2 * (value_group[None, :] * capacity + at[:, None])
            value_scale = tl.load(range_2d, mask=ok, other=0.0).to(tl.float32)
            value_minimum = tl.load(range_2d + 1, mask=ok, other=0.0).to(tl.float32)
            value = (value * value_scale + value_minimum).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (at[None, :] <= position[:, None]) & some[None, :]
        if SLIDING > 0:
            seen = seen & (at[None, :] > position[:, None] - SLIDING)
        scores = tl.where(seen, scores, float("-inf"))
        weights, rescale, maximum, total = _softmax(scores, maximum, total)
        result = result * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")

    out = (head * PARTS + part) * ROWS + row
    tl.store(statistics_ptr + out, maximum)
    tl.store(statistics_ptr + kv_heads * PARTS * ROWS + out, total)
    if begin < stop:
        tl.store(partial_ptr + out[:, None] * PADDED + channel[None, :], result)


@triton.jit
def _softmax(scores, maximum, total):
    """The weights of a block of scores, what earlier results are to be multiplied by, and the new statistics."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # rows that see nothing here
    weights = tl.exp2(scores - safe[:, None])
    rescale = tl.exp2(maximum - safe)
    return weights, rescale, highest, total * rescale + tl.sum(weights, 1)


@triton.jit
def _scale_of(pair, BFLOAT: tl.constexpr):
    """The scale in the lower half of an int32, as float32."""
    if BFLOAT:
        result = (pair << 16).to(tl.float32, bitcast=True)
    else:
        result = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return result


@triton.jit
def _minimum_of(pair, BFLOAT: tl.constexpr):
    """The minimum in its upper half."""
    return _scale_of((pair >> 16) & 0xFFFF, BFLOAT)


@triton.jit
def _plus(codes, like):
    """4-bit codes plus 128, in the type of `like`. In bfloat16 that is a matter of bits."""
    if like.dtype == tl.bfloat16:
        result = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        result = codes.to(like.dtype) + 128.0
    return result


@triton.jit
def _scaled_by(rows, pair, like, BFLOAT: tl.constexpr):
    """Rows times the scales of pairs, in the type of `like`, and what their products with codes plus 128 lack."""
    wide = rows.to(tl.float32)
    scaled = (wide * _scale_of(pair, BFLOAT)[None, :]).to(like.dtype)
    return scaled, tl.sum(wide * _minimum_of(pair, BFLOAT)[None, :] - 128.0 * scaled.to(tl.float32), 1)


@triton.jit
def _part_int4(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_ranges_ptr,
    value_ranges_ptr,
    tokens_ptr,
    stored_ptr,
    partial_ptr,
    statistics_ptr,
    scale,
    query_head_stride,
    query_token_stride,
    slots,
    capacity,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BFLOAT: tl.constexpr,
):
    """As `_part`, for 4 bits: the two codes of a byte belong to the two halves of a token's channels.

    A group's scales multiply the query, and a token's scales its weight, so that codes enter the products as they are.
    Stored blocks are whole and older than every query: without a sliding window none of them is masked.
    """
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    _begin(EARLY)
    row = tl.arange(0, ROWS)
    half = tl.arange(0, PADDED // 2)
    inside = half < HALF
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token
    used = (row < COUNT * HEADS_PER_KV)[:, None] & inside[None, :]
    query_row = (head * HEADS_PER_KV + row % HEADS_PER_KV) * query_head_stride + token * query_token_stride
    query_ptr += query_row[:, None] + half[None, :]
    query_low = tl.load(query_ptr, mask=used, other=0.0)
    query_high = tl.load(query_ptr + HALF, mask=used, other=0.0)
    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, 4, SLIDING, BLOCK, BLOCK)
    keys_ptr += head * slots * DIM
    values_ptr += head * slots * DIM
    key_codes_ptr += head * capacity * HALF
    value_codes_ptr += head * capacity * HALF
    key_ranges_ptr += head * (capacity // BLOCK) * DIM
    value_ranges_ptr += head * VALUE_GROUPS * capacity

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result_low = tl.zeros([ROWS, PADDED // 2], tl.float32)
    result_high = tl.zeros([ROWS, PADDED // 2], tl.float32)
    if part == PARTS - 1:
        for start in range(begin, stop, BLOCK):
            at = start + tl.arange(0, BLOCK)
            some = at < stop
            ok = some[:, None] & inside[None, :]
            recent = (at - window_begin)[:, None] * DIM + half[None, :]
            low = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            high = tl.load(keys_ptr + recent + HALF, mask=ok, other=0.0)
            scores = tl.dot(query_low, tl.trans(low), input_precision="ieee")
            scores += tl.dot(query_high, tl.trans(high), input_precision="ieee")
            seen = (at[None, :] <= position[:, None]) & some[None, :]
            if SLIDING > 0:
                seen = seen & (at[None, :] > position[:, None] - SLIDING)
            scores = tl.where(seen, scores * scale, float("-inf"))
            weights, rescale, maximum, total = _softmax(scores, maximum, total)
            low = tl.load(values_ptr + recent, mask=ok, other=0.0)
            high = tl.load(values_ptr + recent + HALF, mask=ok, other=0.0)
            result_low = result_low * rescale[:, None]
            result_high = result_high * rescale[:, None]
            result_low += tl.dot(weights.to(low.dtype), low, input_precision="ieee")
            result_high += tl.dot(weights.to(high.dtype), high, input_precision="ieee")
    else:
        for start in range(begin, stop, BLOCK):
            at = start + tl.arange(0, BLOCK)
            stored = at[:, None] * HALF + half[None, :]
            ranges = key_ranges_ptr + start // BLOCK * DIM + half
            codes = tl.load(key_codes_ptr + stored, mask=inside[None, :], other=0)
            pair = tl.load(ranges, mask=inside, other=0)
            scaled_low, rest_low = _scaled_by(query_low, pair, query_low, BFLOAT)
            pair = tl.load(ranges + HALF, mask=inside, other=0)
            scaled_high, rest_high = _scaled_by(query_high, pair, query_low, BFLOAT)
            scores = tl.dot(scaled_low, tl.trans(_plus(codes & 15, query_low)), input_precision="ieee")
            scores += tl.dot(scaled_high, tl.trans(_plus(codes >> 4, query_low)), input_precision="ieee")
            scores = (scores + (rest_low + rest_high)[:, None]) * scale
            if SLIDING > 0:
                scores = tl.where(at[None, :] > position[:, None] - SLIDING, scores, float("-inf"))
            weights, rescale, maximum, total = _softmax(scores, maximum, total)
            codes = tl.load(value_codes_ptr + stored, mask=inside[None, :], other=0)
            pair = tl.load(value_ranges_ptr + at)
            scaled_low, rest_low = _scaled_by(weights, pair, query_low, BFLOAT)
            scaled_high, rest_high = scaled_low, rest_low
            if VALUE_GROUPS == 2:
                pair = tl.load(value_ranges_ptr + capacity + at)
                scaled_high, rest_high = _scaled_by(weights, pair, query_low, BFLOAT)
            result_low = result_low * rescale[:, None] + rest_low[:, None]
            result_high = result_high * rescale[:, None] + rest_high[:, None]
            result_low += tl.dot(scaled_low, _plus(codes & 15, query_low), input_precision="ieee")
            result_high += tl.dot(scaled_high, _plus(codes >> 4, query_low), input_precision="ieee")

    out = (head * PARTS + part) * ROWS + row
    tl.store(statistics_ptr + out, maximum)
    tl.store(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + out, total)
    if begin < stop:
        place = partial_ptr + out[:, None] * PADDED + half[None, :]
        tl.store(place, result_low, mask=inside[None, :])
        tl.store(place + HALF, result_high, mask=inside[None, :])


# A 32-bit register of a GPU holds two bfloat16 numbers, or two words of four codes each. In bfloat16, 128 + code is a
# matter of bits.
_ASM = tuple(
    "{.reg .b32 c; " + f"shr.u32 c, $1, {shift}; lop3.b32 $0, c, 0x000F000F, 0x43004300, 0xEA;" + "}"
    for shift in (0, 4, 8, 12)
)


@triton.jit
def _offset(words, like, NUMBER: tl.constexpr, ASM: tl.constexpr):
    """128 + code for one of the four codes of each word, in the type of `like`."""
    if ASM is None:
        result = (((words.to(tl.int32) >> (4 * NUMBER)) & 15).to(tl.float32) + 128.0).to(like.dtype)
    else:
        result = tl.inline_asm_elementwise(ASM[NUMBER], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _minimum(pair, like, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """The minimums of pairs of a scale (low half) and a minimum, in the type of `like`."""
    if ASM is None:
        result = _minimum_of(pair, BFLOAT).to(like.dtype)
    else:
        take: tl.constexpr = "prmt.b32 $0, $1, $2, 0x7632;"
        result = tl.inline_asm_elementwise(take, "=r,r,r", [pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _scaled(query, pair, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """The query times the scales of pairs."""
    if ASM is None:
        result = (query.to(tl.float32) * _scale_of(pair, BFLOAT)).to(query.dtype)
    else:
        times: tl.constexpr = (
            "{.reg .b32 s, z; prmt.b32 s, $2, $3, 0x5410; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, s, z;}"
        )
        result = tl.inline_asm_elementwise(times, "=r,r,r,r", [query, pair], dtype=tl.bfloat16, is_pure=True, pack=2)
    return result


@triton.jit
def _weighted(weights, pair, like, BFLOAT: tl.constexpr, ASM: tl.constexpr):
    """Float32 weights times the scales of pairs, in the type of `like`."""
    if ASM is None:
        result = (weights * _scale_of(pair, BFLOAT)).to(like.dtype)
    else:
        times: tl.constexpr = (
            "{.reg .b32 a, b; shl.b32 a, $3, 16; shl.b32 b, $4, 16; mul.f32 a, $1, a; mul.f32 b, $2, b; "
            "cvt.rn.bf16x2.f32 $0, b, a;}"
        )
        result = tl.inline_asm_elementwise(
            times, "=r,r,r,r,r", [weights, pair], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return result


@triton.jit
def _rounded(weights, like, ASM: tl.constexpr):
    if ASM is None:
        result = weights.to(like.dtype)
    else:
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weights], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return result


@triton.jit
def _power(exponent, ASM: tl.constexpr):
    if ASM is None:
        result = tl.exp2(exponent)
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _merged(result, factor):
    """What all warps hold of a part."""
    return tl.sum(result * factor[:, :, None], 0)


@triton.jit
def _part_int4_long(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_ranges_ptr,
    value_ranges_ptr,
    tokens_ptr,
    stored_ptr,
    partial_ptr,
    statistics_ptr,
    scale,
    query_head_stride,
    query_token_stride,
    slots,
    capacity,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BFLOAT: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `_part`, for 4 bits: each warp attends to blocks of its own, so that none waits for another before the end.

    For that the first dimension of every tensor is the warp. Two bytes are read as a word: its four codes, of the
    channels 2j, 2j + head_dim / 2 and their next, have products of their own. A block's scales multiply the query, and
    a token's scales its weight, so that codes enter the products as they are, plus 128; what that adds, and the
    minimums, is itself left to products, with eight equal columns. Stored blocks are whole and older than every query:
    without a sliding window none of their tokens is masked.
    """
    QUARTER: tl.constexpr = DIM // 4
    HALF: tl.constexpr = DIM // 2
    COLUMNS: tl.constexpr = PADDED // 4 if PADDED >= 64 else 16
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    _begin(EARLY)
    warp = tl.arange(0, WARPS)
    row = tl.program_id(2) * EACH + tl.arange(0, EACH)
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token
    used = (row < COUNT * HEADS_PER_KV)[:, None]
    query_ptr += ((head * HEADS_PER_KV + row % HEADS_PER_KV) * query_head_stride + token * query_token_stride)[:, None]
    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, 4, SLIDING, BLOCK, BLOCK * WARPS)
    maximum = tl.full([WARPS, EACH], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, EACH], tl.float32)
    out = (head * PARTS + part) * ROWS + row
    place = partial_ptr + out[:, None] * PADDED
    if part == PARTS - 1:
        RECENT: tl.constexpr = 32
        channel = tl.arange(0, PADDED)
        within = (channel < DIM)[None, :]
        query = tl.load(query_ptr + channel[None, :], mask=used & within, other=0.0)
        query = tl.broadcast_to(query[None, :, :], (WARPS, EACH, PADDED))
        keys_ptr += head * slots * DIM
        values_ptr += head * slots * DIM
        result = tl.zeros([WARPS, EACH, PADDED], tl.float32)
        for start in tl.range(begin, stop, WARPS * RECENT, num_stages=1):
            at = start + warp[:, None] * RECENT + tl.arange(0, RECENT)[None, :]
            some = at < stop
            ok = some[:, :, None] & within[None, :, :]
            recent = (at - window_begin)[:, :, None] * DIM + channel[None, None, :]
            key = tl.load(keys_ptr + recent, mask=ok, other=0.0)
            value = tl.load(values_ptr + recent, mask=ok, other=0.0)
            scores = tl.dot(query, tl.trans(key, (0, 2, 1)), input_precision="ieee")
            seen = (at[:, None, :] <= position[None, :, None]) & some[:, None, :]
            if SLIDING > 0:
                seen = seen & (at[:, None, :] > position[None, :, None] - SLIDING)
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(maximum, tl.max(scores, 2))
            safe = tl.where(highest == float("-inf"), 0.0, highest)  # rows that see nothing here
            weights = _power((scores - safe[:, :, None]) * scale, ASM)
            rescale = _power((maximum - safe) * scale, ASM)
            total = total * rescale + tl.sum(weights, 2)
            maximum = highest
            result = result * rescale[:, :, None]
            result = tl.dot(_rounded(weights, query, ASM), value, result, input_precision="ieee")
        best = tl.max(maximum, 0)
        factor = _power((maximum - tl.where(best == float("-inf"), 0.0, best)[None, :]) * scale, ASM)
        if begin < stop:
            tl.store(place + channel[None, :], _merged(result, factor), mask=used & within)
    else:
        column = tl.arange(0, COLUMNS)
        inside = (column < QUARTER)[None, :]
        queries = query_ptr[:, :, None] + 2 * column[None, :, None] + tl.arange(0, 2)[None, None, :]
        asked = used[:, :, None] & inside[:, :, None]
        query_0, query_2 = tl.split(tl.load(queries, mask=asked, other=0.0))
        query_1, query_3 = tl.split(tl.load(queries + HALF, mask=asked, other=0.0))
        key_codes_ptr += head * capacity * QUARTER
        value_codes_ptr += head * capacity * QUARTER
        key_pairs_ptr = (key_ranges_ptr + head * (capacity // BLOCK) * DIM).to(tl.pointer_type(tl.int64))
        value_ranges_ptr += head * VALUE_GROUPS * capacity
        less_key = tl.full([WARPS, COLUMNS, 8], -128.0, query_0.dtype)
        less_value = tl.full([WARPS, BLOCK, 8], -128.0, query_0.dtype)
        result_0 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
        result_1 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
        result_2 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
        result_3 = tl.zeros([WARPS, EACH, COLUMNS], tl.float32)
        rest_low = tl.zeros([WARPS, EACH, 8], tl.float32)
        rest_high = tl.zeros([WARPS, EACH, 8], tl.float32)
        for start in range(begin, stop, WARPS * BLOCK):
            some = start + warp * BLOCK < stop
            first = tl.minimum(start + warp * BLOCK, stop - BLOCK)  # a warp without a block repeats the last in vain
            at = first[:, None] + tl.arange(0, BLOCK)[None, :]
            stored = at[:, :, None] * QUARTER + column[None, None, :]
            words = tl.load(key_codes_ptr + stored, mask=inside[None, :, :], other=0)
            scores = tl.zeros([WARPS, EACH, BLOCK], tl.float32)
            rest = tl.zeros([WARPS, EACH, 8], tl.float32)
            ranges = key_pairs_ptr + first[:, None] // BLOCK * HALF + column[None, :]
            pairs_low = tl.load(ranges, mask=inside, other=0)
            pairs_high = tl.load(ranges + QUARTER, mask=inside, other=0)
            for number in tl.static_range(4):
                pair = ((pairs_low if number % 2 == 0 else pairs_high) >> (number // 2 * 32)).to(tl.int32)
                if number == 0:
                    query = query_0
                elif number == 1:
                    query = query_1
                elif number == 2:
                    query = query_2
                else:
                    query = query_3
                query = tl.broadcast_to(query[None, :, :], (WARPS, EACH, COLUMNS))
                scaled = _scaled(query, tl.broadcast_to(pair[:, None, :], (WARPS, EACH, COLUMNS)), BFLOAT, ASM)
                least = tl.broadcast_to(_minimum(pair, query, BFLOAT, ASM)[:, :, None], (WARPS, COLUMNS, 8))
                rest = tl.dot(query, least, rest, input_precision="ieee")
                rest = tl.dot(scaled, less_key, rest, input_precision="ieee")
                codes = tl.trans(_offset(words, query, number, ASM), (0, 2, 1))
                scores = tl.dot(scaled, codes, scores, input_precision="ieee")
            if SLIDING > 0:
                scores = tl.where(at[:, None, :] > position[None, :, None] - SLIDING, scores, float("-inf"))
            added = tl.max(rest, 2)
            highest = tl.maximum(maximum, tl.where(some[:, None], tl.max(scores, 2) + added, float("-inf")))
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            less = tl.where(some[:, None], (safe - added) * scale, float("inf"))
            weights = _power(scores * scale - less[:, :, None], ASM)
            rescale = _power((maximum - safe) * scale, ASM)
            total = total * rescale + tl.sum(weights, 2)
            maximum = highest
            rescale = rescale[:, :, None]
            words = tl.load(value_codes_ptr + stored, mask=inside[None, :, :], other=0)
            plain = _rounded(weights, query_0, ASM)
            pair = tl.load(value_ranges_ptr + at)
            low = _weighted(weights, tl.broadcast_to(pair[:, None, :], (WARPS, EACH, BLOCK)), query_0, BFLOAT, ASM)
            least = tl.broadcast_to(_minimum(pair, query_0, BFLOAT, ASM)[:, :, None], (WARPS, BLOCK, 8))
            rest_low = tl.dot(plain, least, rest_low * rescale, input_precision="ieee")
            rest_low = tl.dot(low, less_value, rest_low, input_precision="ieee")
            high = low
            if VALUE_GROUPS == 2:
                pair = tl.load(value_ranges_ptr + capacity + at)
                high = _weighted(weights, tl.broadcast_to(pair[:, None, :], (WARPS, EACH, BLOCK)), query_0, BFLOAT, ASM)
                least = tl.broadcast_to(_minimum(pair, query_0, BFLOAT, ASM)[:, :, None], (WARPS, BLOCK, 8))
                rest_high = tl.dot(plain, least, rest_high * rescale, input_precision="ieee")
                rest_high = tl.dot(high, less_value, rest_high, input_precision="ieee")
            result_0 = tl.dot(low, _offset(words, query_0, 0, ASM), result_0 * rescale, input_precision="ieee")
            result_1 = tl.dot(high, _offset(words, query_0, 1, ASM), result_1 * rescale, input_precision="ieee")
            result_2 = tl.dot(low, _offset(words, query_0, 2, ASM), result_2 * rescale, input_precision="ieee")
            result_3 = tl.dot(high, _offset(words, query_0, 3, ASM), result_3 * rescale, input_precision="ieee")
        best = tl.max(maximum, 0)
        factor = _power((maximum - tl.where(best == float("-inf"), 0.0, best)[None, :]) * scale, ASM)
        if begin < stop:
            more_low = tl.max(rest_low, 2)[:, :, None]
            more_high = more_low
            if VALUE_GROUPS == 2:
                more_high = tl.max(rest_high, 2)[:, :, None]
            even = place + 2 * column[None, :]
            ok = used & inside
            tl.store(even, _merged(result_0 + more_low, factor), mask=ok)
            tl.store(even + HALF, _merged(result_1 + more_high, factor), mask=ok)
            tl.store(even + 1, _merged(result_2 + more_low, factor), mask=ok)
            tl.store(even + HALF + 1, _merged(result_3 + more_high, factor), mask=ok)
    tl.store(statistics_ptr + out, best * scale)
    tl.store(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + out, tl.sum(total * factor, 0))


@triton.jit
def _combine(
    partial_ptr,
    statistics_ptr,
    output_ptr,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One query's output of one head, from all parts."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.arange(0, PARTS_PADDED)
    channel = tl.arange(0, PADDED)
    at = (head * PARTS + part) * ROWS + row
    if EARLY:
        tl.extra.cuda.gdc_wait()
    maximum = tl.load(statistics_ptr + at, mask=part < PARTS, other=float("-inf"))
    total = tl.load(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + at, mask=part < PARTS, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    some = maximum > float("-inf")
    result = tl.load(partial_ptr + at[:, None] * PADDED + channel[None, :], mask=some[:, None], other=0.0)
    result = tl.sum(result * weight[:, None], 0) / tl.sum(total * weight, 0)
    out = (row // HEADS_PER_KV) * (tl.num_programs(0) * HEADS_PER_KV) + head * HEADS_PER_KV + row % HEADS_PER_KV
    tl.store(output_ptr + out * DIM + channel, result.to(output_ptr.dtype.element_ty), mask=channel < DIM)
