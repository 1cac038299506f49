# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the arguments of a Triton kernel are pointers and numbers of the device: they have no Python type)
"""Decode attention that reads the cache as it is stored: `attention = split_kv`.

A decode step has so few queries that its attention is bound by reading the cache, and so little other parallelism that
one program per head leaves the GPU idle. So the tokens that the cache holds are split over many programs per KV head,
each keeps a running softmax (Milakov and Gimelshein, arXiv 1805.02867), and a second kernel combines their results by
their log-sum-exp, as in Flash-Decoding (Dao et al., 2023). All queries that share a KV head, of every new token, are
the rows of one matrix product, so that grouped-query attention reads each key once. Groups are dequantized in
registers; the lengths are read from device tensors, so a recorded step never touches a slot that holds nothing.

This works where Triton does (on a processor only in its interpreter, for tests). Prefill goes through sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..plan import REPEATED
from .before_cache import GROUP, Float8Layer, QuantizedLayer, StaticLayer, layers
from .load import Unsupported

WORD = "split_kv"
PROGRAMS = 256  # about two for each multiprocessor of a large GPU
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
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            module.kv_layer = None if cache is None else layers(cache)[index]  # type: ignore[assignment]


def _mask(*args: Any, q_offset: int | torch.Tensor = 0, **kwargs: Any) -> torch.Tensor | None:
    if isinstance(q_offset, torch.Tensor):  # a recorded step: the kernel knows what is causal
        return None
    return sdpa_mask(*args, q_offset=q_offset, **kwargs)


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
    if layer is None or layer.lengths is None:
        return _prompt_attention(module, query, key, value, attention_mask, scaling, **kwargs), None
    return decode_attention(query, layer, scaling, sliding_window), None


def _prompt_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    """PyTorch's own attention, which with a mask repeats keys and values for every head: a few KV heads at a time."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    repeated = 2 * group * key.shape[2] * key.shape[3] * key.element_size()
    step = kv_heads if mask is None or group == 1 else max(1, REPEATED // repeated)
    parts = [
        sdpa_attention_forward(
            module,
            query[:, begin * group : (begin + step) * group],
            key[:, begin : begin + step],
            value[:, begin : begin + step],
            mask if mask is None or mask.shape[1] == 1 else mask[:, begin * group : (begin + step) * group],
            scaling=scaling,
            **kwargs,
        )[0]
        for begin in range(0, kv_heads, step)
    ]
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
    stored: tuple[torch.Tensor | None, ...] = (None,) * 6
    kind = FULL
    if isinstance(layer, Float8Layer):
        stored = (layer.key_codes, layer.value_codes, layer.key_scale, None, layer.value_scale, None)
        kind = FLOAT8
    elif isinstance(layer, QuantizedLayer):
        stored = (layer.key_codes, layer.value_codes, layer.key_scale)
        stored += (layer.key_minimum, layer.value_scale, layer.value_minimum)
        kind = layer.bits
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = layer.lengths
    lengths_and_words = (lengths.tokens, lengths.stored, scale, window or 0, kind)
    return _split_kv(query, layer.keys, layer.values, *stored, *lengths_and_words)  # type: ignore[no-any-return]


@torch.library.custom_op("autotune::split_kv_before", mutates_args=())
def _split_kv(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_codes: torch.Tensor | None,
    value_codes: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    key_minimum: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_minimum: torch.Tensor | None,
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
    padded = max(16, triton.next_power_of_2(dim))
    splits = max(1, PROGRAMS // kv_heads)
    parts = splits if kind == FULL else splits + 1  # the last part is the full-precision window
    query = query if query.stride(-1) == 1 else query.contiguous()
    partial = query.new_empty((kv_heads, parts, rows, padded), dtype=torch.float32)
    statistics = query.new_empty((2, kv_heads, parts, rows), dtype=torch.float32)
    output = query.new_empty((1, count, heads, dim))
    if kind == FLOAT8:
        assert key_codes is not None
        assert value_codes is not None
        key_codes, value_codes = key_codes.view(torch.uint8), value_codes.view(torch.uint8)
    shape = {"COUNT": count, "HEADS_PER_KV": group, "DIM": dim, "PADDED": padded, "ROWS": rows, "PARTS": parts}
    value_group = dim if value_scale is None else dim // value_scale.shape[-2]
    halves = kind == 4 and value_group * 2 >= dim and dim % 2 == 0
    with torch.cuda.device_of(query):
        (_part_int4 if halves else _part)[(kv_heads, parts)](
            query,
            keys,
            values,
            key_codes,
            value_codes,
            key_scale,
            key_minimum,
            value_scale,
            value_minimum,
            tokens,
            stored,
            partial,
            statistics,
            scale * 1.4426950408889634,  # the kernel takes powers of 2
            query.stride(1),
            query.stride(2),
            slots,
            0 if key_codes is None else key_codes.shape[2],
            **shape,
            KIND=kind,
            VALUE_GROUP=value_group,
            SLIDING=window,
            BLOCK=GROUP,
        )
        _combine[(kv_heads, count * group)](
            partial, statistics, output, **shape, PARTS_PADDED=triton.next_power_of_2(parts)
        )
    return output


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
):
    """The positions that a part attends to, and the position of the first full-precision slot."""
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
    each = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), BLOCK), parts) * BLOCK
    begin += part * each
    stop = tl.minimum(stop, begin + each)
    if KIND != 0:
        newest = part == PARTS - 1
        begin = tl.where(newest, tl.maximum(first // BLOCK * BLOCK, window_begin), begin)
        stop = tl.where(newest, held + COUNT, stop)
    return begin, stop, window_begin


@triton.jit
def _part(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_scale_ptr,
    key_minimum_ptr,
    value_scale_ptr,
    value_minimum_ptr,
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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one KV head's tokens: the unnormalized result, its running maximum and its sum."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    kv_heads = tl.num_programs(0)
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

    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, KIND, SLIDING, BLOCK)

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
            key = _float8(key_codes_ptr + base * DIM, key_scale_ptr + base, at, channel, ok, some, DIM)
            value = _float8(value_codes_ptr + base * DIM, value_scale_ptr + base, at, channel, ok, some, DIM)
            key = key.to(query.dtype)
            value = value.to(query.dtype)
        else:
            packed: tl.constexpr = DIM * KIND // 8
            groups: tl.constexpr = DIM // VALUE_GROUP
            inside = channel < DIM
            group = (head * (capacity // BLOCK) + start // BLOCK) * DIM + channel
            key = _decoded(key_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            key_scale = tl.load(key_scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
            key_minimum = tl.load(key_minimum_ptr + group, mask=inside, other=0.0).to(tl.float32)
            key = (key * key_scale[None, :] + key_minimum[None, :]).to(query.dtype)
            value = _decoded(value_codes_ptr + head * capacity * packed, at, channel, ok, DIM, KIND)
            group_2d = (head * capacity + at)[:, None] * groups + (channel // VALUE_GROUP)[None, :]
            value_scale = tl.load(value_scale_ptr + group_2d, mask=ok, other=0.0).to(tl.float32)
            value_minimum = tl.load(value_minimum_ptr + group_2d, mask=ok, other=0.0).to(tl.float32)
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
def _offset(codes, like):
    """4-bit codes plus OFFSET, in the type of `like`. In bfloat16, 128 + code is a matter of bits."""
    if like.dtype == tl.bfloat16:
        result = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        result = codes.to(like.dtype) + 128.0
    return result


@triton.jit
def _scaled(query, scale_ptr, minimum_ptr, inside):
    """The query times a group's scales, and what its product with the offset codes lacks."""
    scale = tl.load(scale_ptr, mask=inside, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr, mask=inside, other=0.0).to(tl.float32)
    wide = query.to(tl.float32)
    scaled = (wide * scale[None, :]).to(query.dtype)
    return scaled, tl.sum(wide * minimum[None, :] - 128.0 * scaled.to(tl.float32), 1)


@triton.jit
def _weighted(weights, scale_ptr, minimum_ptr, like):
    """The weights times each token's scale, and what their product with the offset codes lacks."""
    scale = tl.load(scale_ptr).to(tl.float32)
    minimum = tl.load(minimum_ptr).to(tl.float32)
    scaled = (weights * scale[None, :]).to(like.dtype)
    return scaled, tl.sum(weights * minimum[None, :] - 128.0 * scaled.to(tl.float32), 1)


@triton.jit
def _softmax(scores, maximum, total):
    """The weights of a block of scores, what earlier results are to be multiplied by, and the new statistics."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # rows that see nothing here
    weights = tl.exp2(scores - safe[:, None])
    rescale = tl.exp2(maximum - safe)
    return weights, rescale, highest, total * rescale + tl.sum(weights, 1)


@triton.jit
def _part_int4(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_codes_ptr,
    value_codes_ptr,
    key_scale_ptr,
    key_minimum_ptr,
    value_scale_ptr,
    value_minimum_ptr,
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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_part`, for 4 bits: the two codes of a byte belong to the two halves of a token's channels.

    A group's scales multiply the query, and a token's scales its weight, so that codes enter the products as they are.
    Stored blocks are whole and older than every query: without a sliding window none of them is masked.
    """
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    half = tl.arange(0, PADDED // 2)
    inside = half < HALF
    held = tl.load(tokens_ptr).to(tl.int32)
    token = row // HEADS_PER_KV
    position = held + token
    used = (row < COUNT * HEADS_PER_KV)[:, None] & inside[None, :]
    query_row = (head * HEADS_PER_KV + row % HEADS_PER_KV) * query_head_stride + token * query_token_stride
    query_low = tl.load(query_ptr + query_row[:, None] + half[None, :], mask=used, other=0.0)
    query_high = tl.load(query_ptr + query_row[:, None] + half[None, :] + HALF, mask=used, other=0.0)
    begin, stop, window_begin = _range(held, stored_ptr, part, COUNT, PARTS, KIND, SLIDING, BLOCK)
    keys_ptr += head * slots * DIM
    values_ptr += head * slots * DIM
    key_codes_ptr += head * capacity * HALF
    value_codes_ptr += head * capacity * HALF
    key_scale_ptr += head * (capacity // BLOCK) * DIM
    key_minimum_ptr += head * (capacity // BLOCK) * DIM
    groups: tl.constexpr = DIM // VALUE_GROUP
    value_scale_ptr += head * capacity * groups
    value_minimum_ptr += head * capacity * groups

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
            group = start // BLOCK * DIM + half
            codes = tl.load(key_codes_ptr + stored, mask=inside[None, :], other=0)
            scaled_low, rest_low = _scaled(query_low, key_scale_ptr + group, key_minimum_ptr + group, inside)
            scaled_high, rest_high = _scaled(
                query_high, key_scale_ptr + group + HALF, key_minimum_ptr + group + HALF, inside
            )
            scores = tl.dot(scaled_low, tl.trans(_offset(codes & 15, query_low)), input_precision="ieee")
            scores += tl.dot(scaled_high, tl.trans(_offset(codes >> 4, query_low)), input_precision="ieee")
            scores = (scores + (rest_low + rest_high)[:, None]) * scale
            if SLIDING > 0:
                scores = tl.where(at[None, :] > position[:, None] - SLIDING, scores, float("-inf"))
            weights, rescale, maximum, total = _softmax(scores, maximum, total)
            codes = tl.load(value_codes_ptr + stored, mask=inside[None, :], other=0)
            first = at * groups
            scaled_low, rest_low = _weighted(weights, value_scale_ptr + first, value_minimum_ptr + first, query_low)
            last = first + groups - 1
            scaled_high, rest_high = _weighted(weights, value_scale_ptr + last, value_minimum_ptr + last, query_low)
            result_low = result_low * rescale[:, None] + rest_low[:, None]
            result_high = result_high * rescale[:, None] + rest_high[:, None]
            result_low += tl.dot(scaled_low, _offset(codes & 15, query_low), input_precision="ieee")
            result_high += tl.dot(scaled_high, _offset(codes >> 4, query_low), input_precision="ieee")

    out = (head * PARTS + part) * ROWS + row
    tl.store(statistics_ptr + out, maximum)
    tl.store(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + out, total)
    if begin < stop:
        place = partial_ptr + out[:, None] * PADDED + half[None, :]
        tl.store(place, result_low, mask=inside[None, :])
        tl.store(place + HALF, result_high, mask=inside[None, :])


@triton.jit
def _combine(
    partial_ptr,
    statistics_ptr,
    output_ptr,
    COUNT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):
    """One query's output of one head, from all parts."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.arange(0, PARTS_PADDED)
    channel = tl.arange(0, PADDED)
    at = (head * PARTS + part) * ROWS + row
    maximum = tl.load(statistics_ptr + at, mask=part < PARTS, other=float("-inf"))
    total = tl.load(statistics_ptr + tl.num_programs(0) * PARTS * ROWS + at, mask=part < PARTS, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    some = maximum > float("-inf")
    result = tl.load(partial_ptr + at[:, None] * PADDED + channel[None, :], mask=some[:, None], other=0.0)
    result = tl.sum(result * weight[:, None], 0) / tl.sum(total * weight, 0)
    out = (row // HEADS_PER_KV) * (tl.num_programs(0) * HEADS_PER_KV) + head * HEADS_PER_KV + row % HEADS_PER_KV
    tl.store(output_ptr + out * DIM + channel, result.to(output_ptr.dtype.element_ty), mask=channel < DIM)
