"""Layers that keep the newest tokens in full precision and store older ones in 8, 4 or 2 bits, or as float8.

A group of GROUP tokens is quantized exactly once, when it can no longer be rolled back: keys per channel, values per
token, asymmetric (KIVI, arXiv 2402.02750). When that is depends on how many tokens were accepted and on nothing else,
which is why speculation reads the same cache as plain decoding.
"""

from __future__ import annotations

from typing import Any

import torch

from ..support import Unsupported
from .layers import Preallocated

# Both chosen, not measured beside others.
GROUP = 64  # tokens that share a scale, per key channel; the most channels of a value that do
WINDOW = 32  # newest tokens that always stay in full precision; the deepest rollback


class QuantizedLayer(Preallocated):
    """Groups of GROUP tokens in `bits` bits and a full-precision window of the newest WINDOW to WINDOW + GROUP tokens.

    A token's `head_dim` values are packed into head_dim * bits / 8 bytes: with 4 bits, byte j holds channel j in its
    low half and channel j + head_dim / 2 in its high half (2 bits: four quarters). Scales and minimums lie beside each
    other: 4-bit ones in bfloat16 where the model's keys are, all others in float16. Keys and values may differ in size:
    of latent attention the keys are the latent, the values what is rotated.
    """

    def __init__(self, capacity: int, bits: int, spare: int = 0):
        super().__init__(spare)
        self.capacity = -(-capacity // GROUP) * GROUP
        self.bits = bits
        self.stored = 0  # tokens in quantized groups
        self.recent = 0  # tokens in the window
        self.by_heads = False  # `update` leaves it to the attention to `read` stored tokens, some KV heads at a time
        self.older = 0  # stored tokens before those that `update` then returned

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[-1], value_states.shape[-1]
        for dim in (key_dim, value_dim):
            if dim * self.bits % 8:
                raise Unsupported(f"a {self.bits}-bit cache needs keys and values that fill whole bytes, not of {dim}")
        self.value_group = next(size for size in (64, 32, 16, 8, 4, 2, 1) if value_dim % size == 0)
        half = torch.float16
        if self.bits == 4 and key_states.dtype == torch.bfloat16:
            half = torch.bfloat16  # the kernel multiplies with scales as they are
        packed, window = (1, heads, self.capacity), (1, heads, WINDOW + GROUP + self.spare)
        self.key_codes = key_states.new_zeros((*packed, key_dim * self.bits // 8), dtype=torch.uint8)
        self.value_codes = key_states.new_zeros((*packed, value_dim * self.bits // 8), dtype=torch.uint8)
        per_channel = (1, heads, self.capacity // GROUP, key_dim, 2)
        per_token = (1, heads, value_dim // self.value_group, self.capacity, 2)
        self.key_ranges = key_states.new_zeros(per_channel, dtype=half)
        self.value_ranges = key_states.new_zeros(per_token, dtype=half)
        self.keys = key_states.new_zeros((*window, key_dim))
        self.values = value_states.new_zeros((*window, value_dim))
        self.is_initialized = True

    def room(self) -> int:
        return WINDOW + GROUP - self.recent

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.lengths is not None:
            self._append(key_states, value_states, self.lengths.tokens, self.lengths.stored)
            return self._read_all(self.lengths.stored) if self.lengths.read else (key_states, value_states)
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
            assert self.keys is not None
            assert self.values is not None
            self.recent -= GROUP
            oldest = self.keys[:, :, :GROUP], self.values[:, :, :GROUP]
            if self._stores_by_kernel():
                self._store_by_kernel(*oldest, behind=self.recent)
                continue
            self._store(*oldest)
            for window in (self.keys, self.values):
                window[:, :, : self.recent] = window[:, :, GROUP : GROUP + self.recent].clone()

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens > self.recent:
            raise ValueError(f"{tokens} tokens cannot be rolled back: {self.recent} are in the window")
        self.recent -= tokens

    def window(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Copies of the tokens in full precision [1, kv_heads, recent, head_dim]; None for a layer without any."""
        if self.keys is None or self.values is None:
            return None
        return self.keys[:, :, : self.recent].clone(), self.values[:, :, : self.recent].clone()

    def go_back(self, tokens: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """To `tokens` tokens, of which the newest were in the window as given."""
        assert self.keys is not None
        assert self.values is not None
        self.recent = keys.shape[2]
        self.stored = tokens - self.recent
        self.keys[:, :, : self.recent] = keys
        self.values[:, :, : self.recent] = values

    def _stores_by_kernel(self) -> bool:
        """Whether one kernel quantizes: 4 bits on a GPU, where a token's values have a range for each half, or one."""
        assert self.keys is not None
        assert self.values is not None
        dim = self.keys.shape[-1]
        alike = self.keys.is_cuda and self.bits == 4 and self.values.shape[-1] == dim
        return alike and dim & (dim - 1) == 0 and 2 * self.value_group >= dim >= 32

    def _store_by_kernel(self, keys: torch.Tensor, values: torch.Tensor, behind: int = 0) -> None:
        from ..kernels import store

        stored = self.key_codes, self.value_codes, self.key_ranges, self.value_ranges
        store(keys, values, *stored, self.stored, behind)
        self.stored += keys.shape[2]

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens = keys.shape[2]
        if tokens == 0:
            return
        if self._stores_by_kernel():
            self._store_by_kernel(keys, values)
            return
        begin, end = self.stored, self.stored + tokens
        grouped = keys.unflatten(2, (tokens // GROUP, GROUP))
        codes, ranges = _quantize(grouped, 3, self.bits, self.key_ranges.dtype)
        self.key_codes[:, :, begin:end] = _pack(codes.flatten(2, 3), self.bits)
        self.key_ranges[:, :, begin // GROUP : end // GROUP] = ranges
        codes, ranges = _quantize(values.unflatten(3, (-1, self.value_group)), 4, self.bits, self.value_ranges.dtype)
        self.value_codes[:, :, begin:end] = _pack(codes.flatten(3), self.bits)
        self.value_ranges[:, :, :, begin:end] = ranges.transpose(2, 3)
        self.stored = end

    def _read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention is given, where these are the window's: the stored groups, dequantized, before them."""
        self.older = self.stored if self.by_heads else 0
        return (keys, values) if self.by_heads else self.read(keys, values, self.stored)

    def read(
        self, keys: torch.Tensor, values: torch.Tensor, stored: int, heads: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of some KV heads, the first `stored` tokens, dequantized, and `keys` and `values` behind them."""
        keys, values = keys[:, heads], values[:, heads]
        if stored == 0:
            return keys, values
        seen = []
        for new, dequantize in ((keys, self._dequantize_keys), (values, self._dequantize_values)):
            whole = new.new_empty((1, new.shape[1], stored + new.shape[2], new.shape[3]))
            dequantize(whole[:, :, :stored], heads)
            whole[:, :, stored:] = new
            seen.append(whole)
        return seen[0], seen[1]

    def _read_all(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every slot, dequantized, with the window behind the `stored` tokens; what follows is to be masked."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.read(self.keys, self.values, self.capacity)
        slots = stored + torch.arange(self.keys.shape[2], device=stored.device)
        return keys.index_copy_(2, slots, self.keys), values.index_copy_(2, slots, self.values)

    def _dequantize_keys(self, out: torch.Tensor, heads: slice) -> None:
        """The first stored tokens of some KV heads, as many as `out` has, a multiple of GROUP."""
        tokens = out.shape[2]
        groups = tokens // GROUP
        numbers = _numbers(_unpack(self.key_codes[:, heads, :tokens], self.bits), out)
        scale, minimum = self.key_ranges[:, heads, :groups, None].unbind(-1)
        numbers.unflatten(2, (groups, GROUP)).mul_(scale).add_(minimum)
        out.copy_(numbers)

    def _dequantize_values(self, out: torch.Tensor, heads: slice) -> None:
        tokens = out.shape[2]
        numbers = _numbers(_unpack(self.value_codes[:, heads, :tokens], self.bits), out)
        scale, minimum = self.value_ranges[:, heads, :, :tokens, None].transpose(2, 3).unbind(-1)
        numbers.unflatten(3, (-1, self.value_group)).mul_(scale).add_(minimum)
        out.copy_(numbers)

    def advance(self, tokens: int) -> None:
        self.recent += tokens

    def restart(self) -> None:
        self.stored = self.recent = 0

    def tokens(self) -> int:
        return self.stored + self.recent

    def slots(self) -> int:
        return self.capacity + WINDOW + GROUP + self.spare


class Float8Layer(QuantizedLayer):
    """The same window and groups; stored tokens are float8 (e4m3) with one scale per token and head."""

    def __init__(self, capacity: int, spare: int = 0):
        super().__init__(capacity, 8, spare)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (1, key_states.shape[1], self.capacity)
        self.key_codes = key_states.new_zeros((*shape, key_states.shape[-1]), dtype=torch.float8_e4m3fn)
        self.value_codes = value_states.new_zeros((*shape, value_states.shape[-1]), dtype=torch.float8_e4m3fn)
        self.key_scale = key_states.new_zeros((*shape, 1), dtype=torch.float16)
        self.value_scale = key_states.new_zeros((*shape, 1), dtype=torch.float16)
        window = WINDOW + GROUP + self.spare
        self.keys = key_states.new_zeros((*shape[:2], window, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape[:2], window, value_states.shape[-1]))
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

    def _dequantize_keys(self, out: torch.Tensor, heads: slice) -> None:
        tokens = out.shape[2]
        out.copy_(_numbers(self.key_codes[:, heads, :tokens], out).mul_(self.key_scale[:, heads, :tokens]))

    def _dequantize_values(self, out: torch.Tensor, heads: slice) -> None:
        tokens = out.shape[2]
        out.copy_(_numbers(self.value_codes[:, heads, :tokens], out).mul_(self.value_scale[:, heads, :tokens]))


def _numbers(codes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The numbers that codes (uint8, or float8 e4m3) stand for: in `out`, on a CPU in a float32 tensor of their own.

    A CPU multiplies bfloat16 by float16 many times slower than float32, and converts float8 numbers one by one. So
    their bits are moved: the sign to float32's, exponent and mantissa to where float32's meet. What is then left of
    the exponent is the difference of the biases.
    """
    if out.device.type != "cpu":
        return out.copy_(codes)
    if codes.dtype == torch.uint8:
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(0x07F00000 - 2**31)
    return bits.view(torch.float32).mul_(2.0**120)


def _quantize(states: torch.Tensor, dim: int, bits: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) along groups in dimension `dim`, and in its stead the scale and minimum of type `kind`, last."""
    low, high = torch.aminmax(states.float(), dim=dim, keepdim=True)
    minimum = low.to(kind)
    scale = ((high - minimum.float()) / (2**bits - 1)).clamp(min=2**-20).to(kind)
    codes = ((states.float() - minimum.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.stack([scale, minimum], dim=-1).squeeze(dim)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << (bits * index)
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    mask = 2**bits - 1
    shifted = [packed, *(packed >> (bits * index) for index in range(1, 8 // bits))]
    return torch.cat(shifted, dim=-1).bitwise_and_(mask)
