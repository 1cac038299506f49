"""Layers that GPTQ or AWQ packed (model/stored.py says how), read tensor by tensor and kept in 4 bits.

On a GPU the codes become the engine's own 4-bit layer where its groups allow that. Elsewhere `PackedLinear` keeps them
as they are and expands some rows at a time for an ordinary product: as exact, and slower. Columns that GPTQ quantized
in another order than they stand in (`desc_act`) are put in that order, and the input with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...model.stored import AWQ_ORDER, PARTS, QUANTO_GROUP, Packing, UnreadablePacking
from ..linear import Int4Linear, Merged, Slice, int4_multiplies
from ..support import Unsupported
from .place import place, replace
from .tensors import Tensors

EXPANDED = 2**22  # weights that are expanded at a time, 16 MiB in float32; chosen, not measured


class _Packed(NamedTuple):
    """Weights (code - zero) * scale [out, inp] in groups of equal size along the input, in memory of their own."""

    codes: torch.Tensor  # uint8 [out, inp / 2]; the half with the low bits stands first
    scale: torch.Tensor  # [out, groups]
    zero: torch.Tensor  # uint8 [out, groups]
    order: torch.Tensor | None  # int32 [inp]: the input that each column multiplies, where that is not its own


def place_packed(
    model: PreTrainedModel,
    names: tuple[str, ...],
    tensors: Tensors,
    packing: Packing,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Put packed layers in the place of linear ones: one product where their columns stand in the same order."""
    parts: list[_Packed] = []
    biases: list[torch.Tensor] = []
    sizes = []
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parts.append(_read_packed(tensors.get, name, linear, packing, device))
        place(linear, name, tensors, dtype, device)
        biases += [] if linear.bias is None else [linear.bias]
        sizes.append(linear.out_features)
    if len(parts) > 1 and _same_order(parts):
        merged = Merged(_packed_linear(parts, biases, dtype), sizes)
        for index, name in enumerate(names):
            replace(model, name, Slice(merged, index))
        return
    for name in names:
        replace(model, name, _packed_linear([parts.pop(0)], [biases.pop(0)] if biases else [], dtype))


def _read_packed(
    get: Callable[[str], torch.Tensor | None], name: str, linear: nn.Linear, packing: Packing, device: str
) -> _Packed:
    """The stored tensors of the layer `name` on `device`. Raises Unsupported for one that is not as it should be."""
    out, inp = linear.out_features, linear.in_features
    try:
        shapes = packing.shapes(out, inp)
    except UnreadablePacking as error:
        raise Unsupported(f"{name}: {error}") from error
    stored = {part: get(f"{name}.{part}") for part in PARTS}
    for part, shape in shapes.items():
        _check(f"{name}.{part}", stored[part], shape, floating=part == "scales")
    words, zeros, scales = (_moved(stored[part], device) for part in ("qweight", "qzeros", "scales"))
    if packing.method == "awq":
        there = torch.tensor(AWQ_ORDER, device=device).argsort()
        codes = _paired(_halves(words).unflatten(1, (-1, 8))[..., there].flatten(1).T)
        zero = _halves(zeros).unflatten(1, (-1, 8))[..., there].flatten(1)
        return _Packed(codes, scales.T.contiguous(), zero.T.contiguous(), None)
    codes = words.T.contiguous().view(torch.uint8)
    zero = _halves(zeros + 0x11111111 if packing.less_one else zeros)
    order = _order(f"{name}.g_idx", stored["g_idx"], inp, packing)
    if order is not None:
        order = order.to(device)
        codes = _paired(_halves(codes).index_select(1, order))
    return _Packed(codes, scales.T.contiguous(), zero.T.contiguous(), order)


def _check(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], floating: bool) -> None:
    if tensor is None:
        raise Unsupported(f"the checkpoint has no tensor for {name}")
    if tuple(tensor.shape) != shape:
        raise Unsupported(f"{name} has shape {tuple(tensor.shape)}, the config says {shape}")
    if not (
        tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) if floating else tensor.dtype == torch.int32
    ):
        raise Unsupported(f"{name} has the type {tensor.dtype}, not {'a floating one' if floating else 'torch.int32'}")


def _moved(tensor: torch.Tensor | None, device: str) -> torch.Tensor:
    """A copy, never a view of the mapped file."""
    assert tensor is not None
    return tensor.to(device, copy=True)


def _order(name: str, groups: torch.Tensor | None, inp: int, packing: Packing) -> torch.Tensor | None:
    """The inputs sorted by their group; None where they stand like that already."""
    count = inp // packing.group(inp)
    if groups is None and not packing.desc_act:
        return None
    _check(name, groups, (inp,), floating=False)
    assert groups is not None
    if not packing.desc_act and not groups.any():
        return None  # left empty by packages that do not read it without desc_act
    if groups.min() < 0 or groups.max() >= count or (groups.long().bincount(minlength=count) != inp // count).any():
        raise Unsupported(f"{name} does not put {inp // count} inputs in each of {count} groups")
    order = groups.argsort(stable=True).int()
    return None if torch.equal(order, torch.arange(inp, dtype=torch.int32)) else order


def _halves(words: torch.Tensor) -> torch.Tensor:
    """The 4-bit numbers [rows, n] of a tensor's bytes, from the lowest bits of each word on."""
    stored = words.view(torch.uint8)
    return torch.stack([stored & 15, stored >> 4], dim=2).flatten(1)


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """Two codes [rows, columns] to a byte."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def _same_order(parts: list[_Packed]) -> bool:
    """Whether layers of one input can become one product."""
    orders = [part.order for part in parts if part.order is not None]
    return not orders or (len(orders) == len(parts) and all(torch.equal(orders[0], order) for order in orders))


def _packed_linear(parts: list[_Packed], biases: list[torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """The layer with the outputs of all `parts`, which have the same order; consumes them. It computes in `dtype`."""
    order = parts[0].order
    codes = _joined([part.codes for part in parts])
    scale, zero = _joined([part.scale for part in parts]), _joined([part.zero for part in parts])
    parts.clear()
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    (out, inp), groups = (len(codes), 2 * codes.shape[1]), scale.shape[1]
    layer: nn.Module
    if int4_multiplies(codes.device, dtype, out, inp) and inp // groups % QUANTO_GROUP == 0:
        repeats = inp // groups // QUANTO_GROUP  # groups of the layer that share a scale
        scale, zero = (table.T.repeat_interleave(repeats, dim=0) for table in (scale, zero))
        layer = Int4Linear.from_codes(_halves(codes), scale, zero, bias)
    else:
        layer = PackedLinear(codes, scale, zero, bias)
    return layer if order is None else Reordered(layer, order)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class PackedLinear(nn.Module):
    """A layer that keeps its 4-bit codes and expands them, some rows at a time, whenever it is called."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(codes), 2 * codes.shape[1]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        step = max(1, EXPANDED // self.in_features)
        parts = [
            functional.linear(states, self._weight(slice(begin, begin + step), states.dtype))
            for begin in range(0, self.out_features, step)
        ]
        output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return output if self.bias is None else output + self.bias

    def _weight(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight, rounded once."""
        scale, zero = self.scale[rows, :, None].float(), self.zero[rows, :, None].float()
        codes = _halves(self.codes[rows]).float().view(len(scale), scale.shape[1], -1)
        return codes.sub_(zero).mul_(scale).flatten(1).to(dtype)


class Reordered(nn.Module):
    """A layer whose columns stand in another order than its input."""

    order: torch.Tensor

    def __init__(self, linear: nn.Module, order: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("order", order)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear(states.index_select(-1, self.order))  # type: ignore[no-any-return]
