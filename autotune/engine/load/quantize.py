"""Store a linear layer as a word for weights says: by bitsandbytes, by quanto, or in the engine's own 4 bits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...model.weights import FOUR_BITS, int4_group, padded
from ..linear import Int4Linear, Padded, fits_int4, read_directly, widened
from ..support import Unsupported


def source(word: str, device: str) -> str:
    """Where a layer's weight is quantized from: what takes some rows at a time never has it whole on a GPU."""
    return "cpu" if word == "quanto-int4" else device


def quantize_linear(linear: nn.Module, word: str, device: str) -> nn.Module:
    """The same layer with its weight stored as `word` says; consumes `linear`, whose weight is on `device`.

    For quanto-int4 it may be in host memory.
    """
    if word in ("bf16", "fp32", "checkpoint"):  # a layer that a quantized checkpoint left as it was
        return linear
    assert isinstance(linear, nn.Linear)
    width = padded(linear.in_features)
    if word in FOUR_BITS and linear.in_features != width:
        # bitsandbytes' kernels on a CPU would give rows the scales of their neighbours, and ours has no such groups
        return Padded(quantize_linear(widened(linear, width), word, device))
    if word.startswith("bnb"):
        return _bitsandbytes_linear(linear, word, device)
    if word == "quanto-int4" and fits_int4(linear, device):
        packed = Int4Linear(linear, device)
        linear.weight = None  # type: ignore[assignment] # who still holds the layer must not hold its weight
        return packed
    from optimum.quanto import QLinear, qint4, qint8

    linear.to(device)
    quantized = QLinear.from_module(linear, weights=qint8 if word == "quanto-int8" else qint4)
    if word == "quanto-int4" and linear.in_features > int4_group(linear.in_features):
        quantized.weight_group_size = int4_group(linear.in_features)
    linear.weight = None  # type: ignore[assignment] # frees the original before the packed copy is optimized
    quantized.freeze()
    quantized.requires_grad_(False)
    return quantized  # type: ignore[no-any-return]


def _bitsandbytes_linear(linear: nn.Linear, word: str, device: str) -> nn.Module:
    from importlib import import_module

    layers: Any = import_module("bitsandbytes.nn")  # its exports and constructors are typed in part
    layer: Any
    weight, bias = linear.weight.data, linear.bias
    linear.weight = None  # type: ignore[assignment]
    if word == "bnb-int8":
        layer = layers.Linear8bitLt(
            linear.in_features, linear.out_features, bias is not None, has_fp16_weights=False, device="meta"
        )
        layer.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        layer = layers.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=True,
            quant_type=word.removeprefix("bnb-"),
            device="meta",
        )
        layer.weight = layers.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type=word.removeprefix("bnb-"), module=layer
        ).to(device)
        if linear.out_features % 32:  # its packing for AVX-512 asserts that there is no remainder
            layer.support_avx512bf16_for_cpu = False
        if device == "cpu":  # its kernel for AVX-512 reads a row's values as if they lay side by side
            layer.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    layer.bias = bias
    return layer  # type: ignore[no-any-return]


def as_linear(module: nn.Module) -> nn.Linear | None:
    """The linear layer that a module is, in one of transformers' ways: a plain one, Falcon's, or GPT-2's.

    None where it is none. Falcon's writes the product out; GPT-2's weight lies across, and is turned here.
    """
    if type(module) is nn.Linear:
        return module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or type(module).__name__ not in ("FalconLinear", "Conv1D"):
        return None
    weight = weight if isinstance(module, nn.Linear) else nn.Parameter(weight.T.contiguous(), requires_grad=False)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment] # None where it has none
    return linear


def quantized_linears(model: nn.Module, word: str) -> set[str]:
    """The layers, by name, that are stored as `word` says: none where that leaves weights as they are."""
    if word in ("bf16", "fp32", "checkpoint"):
        return set()
    named = {name for name, module in model.named_modules() if as_linear(module) is not None}
    return named - read_directly(model)


def check_linear(model: PreTrainedModel, word: str) -> None:
    """Raises Unsupported where most weights are in no linear layer: they would stay as they are, and nobody be told."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    stored = quantized_linears(model, word)
    matrices = [
        (f"{name}.{key}", name in stored, parameter.numel())
        for name, module in model.named_modules()
        if module not in tables
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    ]
    whole, other = sum(count for *_, count in matrices), [row for row in matrices if not row[1]]
    left = sum(count for *_, count in other)
    if left > whole / 2:
        share, example = f"{left / whole:.0%}", other[0][0]
        raise Unsupported(
            f"{word} stores linear layers; {share} of this model's weights are in others, such as {example}"
        )
