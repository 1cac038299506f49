"""Linear layers for steps of few tokens, whose time goes into reading weights.

Two things make a matrix product at one token faster without changing what it computes. Projections that read the same
input (q, k and v; gate and up) become one product, since a narrow one cannot fill the GPU: `Merged` computes it when
the first of them is called, and hands each its columns. And 4-bit weights are packed for PyTorch's own kernel
(tinygemm, as in gpt-fast) in its widest layout, without the tensor subclass that `torch.compile` fails on.

That kernel's time grows with the tokens, so that prompts are faster when the weights are unpacked, some rows at a time,
for an ordinary product.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
INT4_GROUP = 128  # weights along the input that share a scale, as quanto has it
INNER_K_TILES = 8
CHUNK = 4096  # output features that are quantized at a time
TILE = (8, 128)  # weights that lie together when packed
MANY = 128  # tokens from which unpacking the weights is worth its time
UNPACKED = 2**24  # weights that are unpacked at a time


def siblings(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each linear layer that can be merged with others, by name: the names of all of them, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for parent_name, parent in model.named_modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if not all(type(layer) is nn.Linear for layer in layers):
                continue
            shapes = {(layer.in_features, layer.bias is None) for layer in layers if isinstance(layer, nn.Linear)}
            if len(shapes) == 1:
                group = tuple(f"{parent_name}.{name}" if parent_name else name for name in names)
                found |= dict.fromkeys(group, group)
    return found


def concatenated(layers: list[nn.Linear], device: str) -> nn.Linear:
    """One layer with the outputs of all, on `device`."""
    whole = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]).to(device), requires_grad=False)
    if layers[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]).to(device), requires_grad=False)
    return whole


class Merged:
    """The product that several `Slice`s share. It is kept from the first one's call to the last one's."""

    def __init__(self, linear: nn.Module, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = [None] * len(sizes)

    def take(self, index: int, states: torch.Tensor) -> torch.Tensor:
        if self.input is not states or self.outputs[index] is None:
            self.input = states
            self.outputs = list(self.linear(states).split(self.sizes, dim=-1))
        output = self.outputs[index]
        assert output is not None
        self.outputs[index] = None
        if all(other is None for other in self.outputs):
            self.input = None
        return output


class Slice(nn.Module):
    """Stands where one of several merged layers stood; the first of them owns the weights."""

    def __init__(self, merged: Merged, index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index
        self.out_features = merged.sizes[index]
        if index == 0:
            self.linear = merged.linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.merged.take(self.index, states)


def fits_int4(linear: nn.Linear) -> bool:
    """Whether PyTorch's 4-bit kernel can multiply this layer on its device."""
    return int4_multiplies(linear.weight.device, linear.weight.dtype, linear.out_features, linear.in_features)


def int4_multiplies(device: torch.device, dtype: torch.dtype, out: int, inp: int) -> bool:
    """The same of `out` x `inp` weights that are not there yet."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and out % 8 == 0
        and inp % INT4_GROUP == 0
    )


class Int4Linear(nn.Module):
    """A bfloat16 layer in 4 bits: a scale and a zero per INT4_GROUP weights, w = (code - 8) * scale + zero."""

    packed: torch.Tensor
    scale_zero: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        parts = [_quantize_rows(rows) for rows in linear.weight.detach().split(CHUNK)]
        self.register_buffer("packed", _pack(torch.cat([part[0] for part in parts])))
        self.register_buffer("scale_zero", torch.cat([part[1] for part in parts], dim=1).contiguous())

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: nn.Parameter | None
    ) -> Int4Linear:
        """The layer of weights (codes - zero) * scale, whose scale is rounded to bfloat16.

        `codes` [out, in] and `zero` are uint8, 0 to 15; `scale` and `zero` are [in / INT4_GROUP, out].
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = codes.shape
        layer.bias = bias
        layer.register_buffer("packed", _pack(codes[:, ::2] << 4 | codes[:, 1::2]))
        rounded = scale.bfloat16()
        shift = (8 - zero.float()) * rounded.float()  # of the rounded scale: the grid's zero stays where it was
        layer.register_buffer("scale_zero", torch.stack([rounded, shift.bfloat16()], dim=2))
        return layer

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, self.in_features)
        output = _multiply(rows, self.packed, self.scale_zero) if len(rows) < MANY else self._multiply_unpacked(rows)
        output = output.view(*states.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _multiply_unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        places = _places(str(rows.device))
        if places is None:
            return _multiply(rows, self.packed, self.scale_zero)
        output = rows.new_empty((len(rows), self.out_features))
        step = max(1, UNPACKED // self.in_features // TILE[0]) * TILE[0]
        for begin in range(0, self.out_features, step):
            part = slice(begin, begin + step)
            tiles = slice(begin // TILE[0], (begin + step) // TILE[0])
            weight = _unpack(self.packed[tiles], self.scale_zero[:, part], places)
            output[:, part] = rows @ weight.T
        return output


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack(codes, INNER_K_TILES)  # type: ignore[no-any-return]


def _multiply(rows: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm(rows, packed, INT4_GROUP, scale_zero)  # type: ignore[no-any-return]


def _unpack(packed: torch.Tensor, scale_zero: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The weights [rows, columns] of packed tiles, rounded once."""
    if not packed.is_cuda:
        return unpack_slowly(packed, scale_zero, places)
    from .kernels import unpack

    return unpack(packed, scale_zero, places, TILE)


def unpack_slowly(packed: torch.Tensor, scale_zero: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The same without a kernel of our own, on any device."""
    tiles, columns = packed.shape[:2]
    codes = packed.view(torch.uint8).reshape(tiles, columns, -1).index_select(2, (places // 2).flatten())
    codes = codes.bitwise_right_shift_((places % 2 * 4).flatten().to(torch.uint8)).bitwise_and_(15)
    codes = codes.view(tiles, columns, *TILE).transpose(1, 2)
    centred = codes.to(torch.bfloat16, memory_format=torch.contiguous_format).sub_(8).view(-1, columns, TILE[1])
    scale, zero = scale_zero.transpose(0, 1).split(1, dim=2)
    return torch.addcmul(zero, centred, scale, out=centred).view(tiles * TILE[0], columns * TILE[1])


@functools.cache
def _places(device: str) -> torch.Tensor | None:
    """Where each weight of a packed tile lies: the number of its half byte; None where that cannot be told.

    The layout is the kernel's own business, so it is asked: tiles whose codes are the digits of each weight's number
    are packed, and what is found is checked against the kernel itself.
    """
    number = torch.arange(TILE[0] * TILE[1], device=device)
    found = torch.zeros_like(number)
    for digit in (0, 4, 8):
        found |= _nibbles(((number >> digit) & 15).to(torch.uint8).view(TILE)).long() << digit
    places = found.argsort().int().view(TILE)
    codes = (number * 7 + number // 16).bitwise_and(15).to(torch.uint8).view(TILE)
    packed = _pack(codes[:, ::2] << 4 | codes[:, 1::2])
    scale_zero = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=device).expand(1, TILE[0], 2).contiguous()
    product = _multiply(torch.eye(TILE[1], dtype=torch.bfloat16, device=device), packed, scale_zero)
    return places if torch.equal(_unpack(packed, scale_zero, places), product.T) else None


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The 4-bit numbers of one packed tile in memory order, low halves first."""
    packed = _pack(codes[:, ::2] << 4 | codes[:, 1::2]).view(torch.uint8).flatten()
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two to a byte [rows, columns / 2], and scale and zero [groups, rows, 2]."""
    grouped = weight.float().unflatten(1, (-1, INT4_GROUP))
    low, high = torch.aminmax(grouped, dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((grouped - zero.float()) / scale.float() + 8).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], torch.cat([scale, zero], dim=2).transpose(0, 1)
