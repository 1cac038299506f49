"""KV caches that can be appended to and rolled back without touching what is already stored.

`dynamic`, `sliding` and `offloaded` are transformers' own. `static` and `quantized-*` are preallocated here, so that the
footprint does not creep. A quantized cache keeps the newest tokens in full precision and quantizes a group of GROUP
tokens exactly once, when it can no longer be rolled back: keys per channel, values per token, asymmetric (KIVI,
arXiv 2402.02750). When a group is quantized depends on how many tokens were accepted and on nothing else, which is why
speculation reads the same cache as plain decoding: `room` says how many tokens fit before that moment.

Shapes: keys and values are [1, kv_heads, tokens, head_dim]; one request at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from .load import Unsupported

GROUP = 64  # tokens that share a scale, per key channel
WINDOW = 32  # newest tokens that always stay in full precision; the deepest rollback
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values only


def make_cache(word: str, config: Any, capacity: int, device: str) -> Cache:
    """An empty cache for one request of at most `capacity` tokens. Raises Unsupported."""
    text = config.get_text_config(decoder=True)
    layers = int(text.num_hidden_layers)
    stateful = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    if stateful:
        raise Unsupported(f"{text.model_type} has {min(stateful)} layers: their state cannot be rolled back")
    match word:
        case "dynamic":
            # Without the config every layer keeps all tokens; models with a window mask what they must not see.
            cache: Cache = DynamicCache()
        case "sliding":
            if not _has_sliding_layers(text):
                raise Unsupported(f"{text.model_type} has no sliding-window layers: cache = sliding does not apply")
            cache = DynamicCache(config=text)
            cache.activate_past_recording()
        case "offloaded":
            if device == "cpu":
                raise Unsupported("cache = offloaded moves the cache from a GPU to host memory: there is no GPU here")
            cache = DynamicCache(offloading=True)
        case "static":
            cache = Cache(layers=[StaticLayer(capacity) for _ in range(layers)])
        case "quantized-8" | "quantized-4" | "quantized-2":
            cache = Cache(layers=[QuantizedLayer(capacity, int(word[-1])) for _ in range(layers)])
        case "quantized-fp8":
            cache = Cache(layers=[Float8Layer(capacity) for _ in range(layers)])
        case _:
            raise Unsupported(f"unknown cache {word}")
    return cache


def room(cache: Cache) -> int:
    """How many tokens may be appended, and still be rolled back, before the cache must `settle`."""
    return min((layer.room() for layer in cache.layers if isinstance(layer, QuantizedLayer)), default=2**31)


def settle(cache: Cache) -> None:
    """All tokens so far are final: quantize the groups that have left the full-precision window."""
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            layer.settle()
        elif getattr(layer, "record_past", False):
            layer.crop(0)  # sliding layers drop what has left their window


def rollback(cache: Cache, tokens: int) -> None:
    """Forget the newest `tokens` tokens."""
    if tokens > 0:
        for layer in cache.layers:
            if layer.is_initialized:  # layers that share another's keys and values hold nothing
                layer.crop(-tokens)


def stored_bytes(cache: Cache) -> int:
    """What the cache holds on its device now, in bytes."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    )


def _has_sliding_layers(text: Any) -> bool:
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(text, "sliding_window", None))


class StaticLayer(CacheLayerMixin):
    """Preallocated slots in full precision. Reads return only the slots that hold something."""

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (1, key_states.shape[1], self.capacity, key_states.shape[-1])
        self.keys = key_states.new_empty(shape)
        self.values = value_states.new_empty((*shape[:-1], value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens > self.length:
            raise ValueError(f"{tokens} tokens cannot be rolled back: the cache holds {self.length}")
        self.length -= tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class QuantizedLayer(CacheLayerMixin):
    """Groups of GROUP tokens in `bits` bits and a full-precision window of the newest WINDOW to WINDOW + GROUP tokens.

    A token's `head_dim` values are packed into head_dim * bits / 8 bytes: with 4 bits, byte j holds channel j in its low
    half and channel j + head_dim / 2 in its high half (2 bits: four quarters). Scale and minimum are float16.
    """

    is_sliding = False

    def __init__(self, capacity: int, bits: int):
        super().__init__()
        self.capacity = -(-capacity // GROUP) * GROUP
        self.bits = bits
        self.stored = 0  # tokens in quantized groups
        self.recent = 0  # tokens in the window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, dim = key_states.shape[1], key_states.shape[-1]
        if value_states.shape[-1] != dim or dim * self.bits % 8 or dim % (8 // self.bits):
            raise Unsupported(f"a {self.bits}-bit cache needs keys and values of one even size, not {dim}")
        self.value_group = next(size for size in (64, 32, 16, 8, 4, 2, 1) if dim % size == 0)
        device, half = key_states.device, torch.float16
        packed = (1, heads, self.capacity, dim * self.bits // 8)
        per_channel = (1, heads, self.capacity // GROUP, 1, dim)
        per_token = (1, heads, self.capacity, dim // self.value_group, 1)
        self.key_codes = torch.empty(packed, dtype=torch.uint8, device=device)
        self.value_codes = torch.empty(packed, dtype=torch.uint8, device=device)
        self.key_scale = torch.empty(per_channel, dtype=half, device=device)
        self.key_minimum = torch.empty(per_channel, dtype=half, device=device)
        self.value_scale = torch.empty(per_token, dtype=half, device=device)
        self.value_minimum = torch.empty(per_token, dtype=half, device=device)
        self.keys = key_states.new_empty((1, heads, WINDOW + GROUP, dim))
        self.values = torch.empty_like(self.keys)
        self.is_initialized = True

    def room(self) -> int:
        return WINDOW + GROUP - self.recent

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        new = key_states.shape[-2]
        if self.stored + self.recent + new > self.capacity:
            raise ValueError(f"{self.stored + self.recent + new} tokens do not fit a cache of {self.capacity}")
        if new <= self.room():
            end = self.recent + new
            self.keys[:, :, self.recent : end] = key_states
            self.values[:, :, self.recent : end] = value_states
            self.recent = end
            return self._read(self.keys[:, :, :end], self.values[:, :, :end])
        # A prefill chunk: it is attended to in full precision, and what leaves the window is stored at once.
        keys = torch.cat([self.keys[:, :, : self.recent], key_states], dim=2)
        values = torch.cat([self.values[:, :, : self.recent], value_states], dim=2)
        seen = self._read(keys, values)
        groups = max(0, (keys.shape[2] - WINDOW) // GROUP)
        self._store(keys[:, :, : groups * GROUP], values[:, :, : groups * GROUP])
        self.recent = keys.shape[2] - groups * GROUP
        self.keys[:, :, : self.recent] = keys[:, :, groups * GROUP :]
        self.values[:, :, : self.recent] = values[:, :, groups * GROUP :]
        return seen

    def settle(self) -> None:
        while self.recent >= WINDOW + GROUP:
            assert self.keys is not None and self.values is not None
            self._store(self.keys[:, :, :GROUP], self.values[:, :, :GROUP])
            self.recent -= GROUP
            for window in (self.keys, self.values):
                window[:, :, : self.recent] = window[:, :, GROUP : GROUP + self.recent].clone()

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens > self.recent:
            raise ValueError(f"{tokens} tokens cannot be rolled back: {self.recent} are in the window")
        self.recent -= tokens

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens = keys.shape[2]
        if tokens == 0:
            return
        begin, end = self.stored, self.stored + tokens
        grouped = keys.unflatten(2, (tokens // GROUP, GROUP))
        codes, scale, minimum = _quantize(grouped, 3, self.bits)
        self.key_codes[:, :, begin:end] = _pack(codes.flatten(2, 3), self.bits)
        self.key_scale[:, :, begin // GROUP : end // GROUP] = scale
        self.key_minimum[:, :, begin // GROUP : end // GROUP] = minimum
        codes, scale, minimum = _quantize(values.unflatten(3, (-1, self.value_group)), 4, self.bits)
        self.value_codes[:, :, begin:end] = _pack(codes.flatten(3), self.bits)
        self.value_scale[:, :, begin:end] = scale
        self.value_minimum[:, :, begin:end] = minimum
        self.stored = end

    def _read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored groups, dequantized, and the window behind them."""
        if self.stored == 0:
            return keys, values
        groups = self.stored // GROUP
        old_keys = _unpack(self.key_codes[:, :, : self.stored], self.bits, keys.dtype).unflatten(2, (groups, GROUP))
        old_keys.mul_(self.key_scale[:, :, :groups]).add_(self.key_minimum[:, :, :groups])
        old_values = _unpack(self.value_codes[:, :, : self.stored], self.bits, values.dtype)
        old_values = old_values.unflatten(3, (-1, self.value_group))
        old_values.mul_(self.value_scale[:, :, : self.stored]).add_(self.value_minimum[:, :, : self.stored])
        return torch.cat([old_keys.flatten(2, 3), keys], dim=2), torch.cat([old_values.flatten(3), values], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.stored + self.recent

    def get_max_length(self) -> int:
        return self.capacity


class Float8Layer(QuantizedLayer):
    """The same window and groups; stored tokens are float8 (e4m3) with one scale per token and head."""

    def __init__(self, capacity: int):
        super().__init__(capacity, bits=8)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (1, key_states.shape[1], self.capacity)
        self.key_codes = key_states.new_empty((*shape, key_states.shape[-1]), dtype=torch.float8_e4m3fn)
        self.value_codes = value_states.new_empty((*shape, value_states.shape[-1]), dtype=torch.float8_e4m3fn)
        self.key_scale = key_states.new_empty((*shape, 1), dtype=torch.float16)
        self.value_scale = key_states.new_empty((*shape, 1), dtype=torch.float16)
        self.keys = key_states.new_empty((*shape[:2], WINDOW + GROUP, key_states.shape[-1]))
        self.values = value_states.new_empty((*shape[:2], WINDOW + GROUP, value_states.shape[-1]))
        self.is_initialized = True

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        begin, end = self.stored, self.stored + keys.shape[2]
        for states, codes, scales in (
            (keys, self.key_codes, self.key_scale),
            (values, self.value_codes, self.value_scale),
        ):
            scale = (states.abs().amax(dim=3, keepdim=True).float() / 448).clamp(min=2**-20).half()
            codes[:, :, begin:end] = (states.float() / scale.float()).clamp(-448, 448).to(codes.dtype)
            scales[:, :, begin:end] = scale
        self.stored = end

    def _read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old_keys = self.key_codes[:, :, : self.stored].to(keys.dtype).mul_(self.key_scale[:, :, : self.stored])
        old_values = self.value_codes[:, :, : self.stored].to(values.dtype).mul_(self.value_scale[:, :, : self.stored])
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


def _quantize(states: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8) along groups in dimension `dim`, with the float16 scale and minimum that decode them."""
    low, high = torch.aminmax(states.float(), dim=dim, keepdim=True)
    minimum = low.half()
    scale = ((high - minimum.float()) / (2**bits - 1)).clamp(min=2**-20).half()
    codes = ((states.float() - minimum.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, minimum


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << (bits * index)
    return packed


def _unpack(packed: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    if bits == 8:
        return packed.to(dtype)
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * index)) & mask for index in range(8 // bits)], dim=-1).to(dtype)
