"""Linear layers for steps of few tokens, whose time goes into reading weights.

Two things make a matrix product at one token faster without changing what it computes. Projections that read the same
input (q, k and v; gate and up) become one product, since a narrow one cannot fill the GPU: `Merged` computes it when
the first of them is called, and hands each its columns. And 4-bit weights have a kernel of our own (int4.py), without
the tensor subclass that `torch.compile` fails on. For a prompt they are unpacked, some rows at a time, for an ordinary
product.
"""

from __future__ import annotations

import functools
import inspect
import re
from importlib.util import find_spec

import torch
from torch import nn

from ..model.activations import UNPACKED
from ..model.weights import WIDTH_4, int4_group
from .int4 import counters, multiply, pack, plane, product, unpack

# transformers' names, in the models that have them; a model may define them in any order
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen3.5's delta nets
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next's
)
# `x @ self.dt_proj.weight`, say. What is only handed to a kernel for training, on a line of its own, or only asked for
# its size or type, is not meant.
_READ = re.compile(
    r"^(?!\s*(?:\w+=)?self\.\w+\.weight,\s*$).*?self\.(\w+)\.weight(?!\.(?:dtype|device|shape)|\[|\w)", re.MULTILINE
)
# Tokens from which unpacking the weights is worth its time, on an H200 (benchmarks/LOG.md, "4-bit products"): gate and
# up take 71 µs by the kernel and 162 unpacked at 64 tokens, 137 and 191 at 128. More the kernel does not take.
MANY = 128
TILE = 128  # outputs that cuBLAS computes together; that a narrower rest is slow was argued, not measured


def read_directly(model: nn.Module) -> set[str]:
    """The linear layers, by name, that stay as they are: the model's code reads their weights, as some routers do."""
    return {
        f"{parent_name}.{name}" if parent_name else name
        for parent_name, parent in model.named_modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and name in _weights_read(type(parent))  # type: ignore[arg-type] # mypy: no type is hashable
    }


@functools.cache
def _weights_read(kind: type) -> frozenset[str]:
    """The layers whose weights this class of transformers takes instead of calling them."""
    try:
        own = [inspect.getsource(part) for part in kind.__mro__ if part.__module__.startswith("transformers.models.")]
    except OSError:  # installed without sources
        return frozenset()
    return frozenset(name for source in own for name in _READ.findall(source))


def siblings(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each linear layer that can be merged with others, by name: the names of all, in the order of the model."""
    found: dict[str, tuple[str, ...]] = {}
    taken = read_directly(model)
    for parent_name, parent in model.named_modules():
        for names in SIBLINGS:
            layers = {name: layer for name, layer in parent.named_children() if name in names}
            if len(layers) < len(names) or not all(type(layer) is nn.Linear for layer in layers.values()):
                continue
            shapes = {(layer.in_features, layer.bias is None) for layer in layers.values()}
            group = tuple(f"{parent_name}.{name}" if parent_name else name for name in layers)
            if len(shapes) == 1 and taken.isdisjoint(group):
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


def fits_int4(linear: nn.Linear, device: str) -> bool:
    """Whether our own 4-bit kernel can multiply this layer on the device."""
    return int4_multiplies(torch.device(device), linear.weight.dtype, linear.out_features, linear.in_features)


def int4_multiplies(device: torch.device, dtype: torch.dtype, out: int, inp: int) -> bool:
    """The same of `out` x `inp` weights that are not there yet."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and inp % WIDTH_4 == 0
        and find_spec("triton") is not None
    )


class Padded(nn.Module):
    """A layer that is stored with more inputs than it has: what is added is zero, and so are its weights."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        more: int = self.linear.in_features - states.shape[-1]  # type: ignore[assignment, operator]
        return self.linear(nn.functional.pad(states, (0, more)))  # type: ignore[no-any-return]


def widened(linear: nn.Linear, inputs: int) -> nn.Linear:
    """The same layer with zero weights for inputs that it does not have; consumes it."""
    wide = nn.Linear(inputs, linear.out_features, bias=False, device="meta")
    weight = nn.functional.pad(linear.weight.detach(), (0, inputs - linear.in_features))
    linear.weight = None  # type: ignore[assignment]
    wide.weight, wide.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return wide


class Int4Linear(nn.Module):
    """A bfloat16 layer in 4 bits: a scale and a zero per `int4_group` weights, w = (16 + code) * scale + zero.

    With `whole` zeros, w = (16 + code + zero) * scale.
    """

    packed: torch.Tensor
    scale_zero: torch.Tensor
    bias: nn.Parameter | None
    counters: torch.Tensor
    whole = False

    def __init__(self, linear: nn.Linear, device: str) -> None:
        super().__init__()
        inp, out = self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(device), requires_grad=False)
        # what stays is allocated before what does not, which would leave holes between the layers
        word = plane(inp)
        self.register_buffer("packed", torch.empty((inp // (4 * word), out, word), dtype=torch.int16, device=device))
        scale_zero = torch.empty((inp // int4_group(inp), out, 2), dtype=torch.bfloat16, device=device)
        self.register_buffer("scale_zero", scale_zero)
        self.register_buffer("counters", counters(out, device), persistent=False)
        for begin, end in _row_blocks(out, inp):
            codes, scale_zero[:, begin:end] = _quantize_rows(linear.weight.detach()[begin:end].to(device))
            self.packed[:, begin:end] = pack(codes)

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: nn.Parameter | None
    ) -> Int4Linear:
        """The layer of weights (codes - zero) * scale, whose scale is rounded to bfloat16.

        `codes` [out, in] and `zero` are uint8, 0 to 15; `scale` and `zero` are [groups, out].
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = codes.shape
        layer.bias = bias
        blocks = _row_blocks(*codes.shape)
        layer.register_buffer("packed", torch.cat([pack(codes[begin:end]) for begin, end in blocks], dim=1))
        layer.whole = True
        layer.register_buffer("scale_zero", torch.stack([scale.bfloat16(), -16 - zero.bfloat16()], dim=2))
        layer.register_buffer("counters", counters(layer.out_features, codes.device), persistent=False)
        return layer

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, self.in_features)
        if len(rows) < MANY:
            few = product if torch.compiler.is_compiling() else multiply  # the operation costs its caller 10 µs more
            output: torch.Tensor = few(rows, self.packed, self.scale_zero, self.counters, self.whole)
        else:
            output = self._multiply_unpacked(rows)
        output = output.view(*states.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _multiply_unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        output = rows.new_empty((len(rows), self.out_features))
        for begin, end in _row_blocks(self.out_features, self.in_features):
            weights = unpack(self.packed, self.scale_zero, begin, end, self.whole)
            torch.mm(rows, weights.T, out=output[:, begin:end])
            del weights  # before the next are made
        return output


def _row_blocks(out: int, inp: int) -> list[tuple[int, int]]:
    """The rows of an `out` x `inp` weight, about UNPACKED weights at a time: begins and ends, of whole tiles."""
    step = max(TILE, UNPACKED // inp // TILE * TILE)
    return [(begin, min(out, begin + step)) for begin in range(0, out, step)]


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] and scale and zero [groups, rows, 2] of the grid whose first point is 16 * scale + zero.

    The codes suit the zero as it is stored: its rounding, a sixteenth of the scale at most, only moves the grid.
    """
    grouped = weight.float().unflatten(1, (-1, int4_group(weight.shape[1])))
    low, high = torch.aminmax(grouped, dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low - 16 * scale.float()).bfloat16()
    codes = ((grouped - zero.float()) / scale.float() - 16).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    return codes, torch.cat([scale, zero], dim=2).transpose(0, 1).contiguous()
