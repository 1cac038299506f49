"""Load a model tensor by tensor: each weight reaches the device alone and is quantized before the next one is read.

So the peak while loading is the final footprint and one tensor more, embeddings can stay in host memory without ever
visiting the device, and the same code serves a GPU and a CPU. Only safetensors are read. GPTQ and AWQ checkpoints keep
the 4 bits that they have; those of other methods go through transformers' own loader.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..config import HEAD_WEIGHTS
from ..model.activations import MERGED
from ..model.stored import PARTS, Packing, UnreadablePacking, read_packing
from .linear import Int4Linear, Merged, Slice, concatenated, fits_int4, siblings
from .support import Unsupported, compute_dtype

Progress = Callable[[str], None]


def load_model(
    folder: str | Path,
    *,
    weights: str = "bf16",
    lm_head: str = "bf16",
    embeddings: str = "device",
    attention: str = "sdpa",
    device: str = "cpu",
    progress: Progress = lambda phase: None,
    merge: bool | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`, its linear layers stored as `weights` says.

    With `merge` (the default on a GPU), projections that read the same input become one product.
    Raises Unsupported for a combination that this model or machine cannot run.
    """
    if attention == "split_kv":
        register_split_kv(device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    dtype = compute_dtype(weights, device)
    packing = _check_quantized(config, weights, lm_head, embeddings)
    if weights == "checkpoint" and packing is None:
        return _load_as_stored(folder, attention, device)
    model = _empty_model(config, dtype, attention)
    if weights not in ("bf16", "fp32", "checkpoint"):
        _check_linear(model, weights)
    tensors = _Tensors(Path(folder), model, packed=packing is not None)
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))
    groups = siblings(model) if (device != "cpu" if merge is None else merge) and weights in MERGED else {}
    groups = {name: group for name, group in groups.items() if len({tensors.packs(one) for one in group}) == 1}
    modules = list(model.named_modules())
    shared = tied and lm_head in ("bf16", "fp32") and embeddings == "device"
    if output is not None and not shared:
        # first, while the device is empty: it is the largest matrix, and quantizing it takes it whole
        name = _name_of(model, output)
        if packing is not None and tensors.packs(name):
            _place_packed(model, (name,), tensors, packing, dtype, device)
        else:
            word = HEAD_WEIGHTS.get(lm_head, lm_head)
            _place(output, _name_of(model, embedding) if tied else name, tensors, dtype, _source(word, device))
            _replace(model, name, quantize_linear(output, word, device))
        _trim(device)
    for name, module in modules:
        if module is output:
            continue
        if packing is not None and tensors.packs(name):
            group = groups.get(name, (name,))
            if name == group[-1]:
                _place_packed(model, group, tensors, packing, dtype, device)
                _trim(device)
            continue
        on_host = (module is embedding and embeddings == "host") or name in groups
        on_host = on_host or (type(module) is nn.Linear and _source(weights, device) == "cpu")
        _place(module, name, tensors, dtype, "cpu" if on_host else device)
        if name in groups:
            if name == groups[name][-1]:
                _merge(model, groups[name], weights, device)
        elif type(module) is nn.Linear:
            _replace(model, name, quantize_linear(module, weights, device))
            _trim(device)
    if output is not None and shared:
        output.weight = embedding.weight
    leftovers = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if leftovers:
        raise Unsupported(f"the checkpoint has no tensor for {leftovers[0]} ({len(leftovers)} missing in all)")
    if embeddings == "host" and device != "cpu":
        from .embedding import lock_pages

        lock_pages(embedding, device)
    if device == "cpu" and dtype == torch.bfloat16:
        from .grouped import use_grouped

        use_grouped(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _source(word: str, device: str) -> str:
    """Where a layer's weight is quantized from: what takes some rows at a time never has it whole on a GPU."""
    return "cpu" if word == "quanto-int4" else device


def quantize_linear(linear: nn.Module, word: str, device: str) -> nn.Module:
    """The same layer with its weight stored as `word` says; consumes `linear`, whose weight is on `device`.

    For quanto-int4 it may be in host memory.
    """
    if word in ("bf16", "fp32", "checkpoint"):  # a layer that a quantized checkpoint left as it was
        return linear
    assert isinstance(linear, nn.Linear)
    if word.startswith("bnb"):
        return _bitsandbytes_linear(linear, word, device)
    if word == "quanto-int4" and fits_int4(linear, device):
        packed = Int4Linear(linear, device)
        linear.weight = None  # type: ignore[assignment] # who still holds the layer must not hold its weight
        return packed
    from optimum.quanto import QLinear, qint4, qint8

    linear.to(device)
    quantized = QLinear.from_module(linear, weights=qint8 if word == "quanto-int8" else qint4)
    linear.weight = None  # type: ignore[assignment] # frees the original before the packed copy is optimized
    quantized.freeze()
    quantized.requires_grad_(False)
    return quantized  # type: ignore[no-any-return]


def _merge(model: nn.Module, names: tuple[str, ...], weights: str, device: str) -> None:
    """Put one product in the place of several layers, whose weights are in host memory."""
    layers = [model.get_submodule(name) for name in names]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    whole = quantize_linear(concatenated(linears, _source(weights, device)), weights, device)
    for linear in linears:
        linear.weight = None  # type: ignore[assignment]
    merged = Merged(whole, [linear.out_features for linear in linears])
    for index, name in enumerate(names):
        _replace(model, name, Slice(merged, index))


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
        if device == "cpu" and linear.in_features % 64:  # there its kernels give rows the scales of their neighbours
            raise Unsupported(f"{word} on a CPU needs layers whose input is a multiple of 64, not {linear.in_features}")
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
    layer.bias = bias
    return layer  # type: ignore[no-any-return]


def _check_linear(model: PreTrainedModel, word: str) -> None:
    """Raises Unsupported where most weights are in no linear layer: they would stay as they are, and nobody be told."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = [
        (f"{name}.{key}", type(module) is nn.Linear, parameter.numel())
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


def register_split_kv(device: str) -> None:
    """Raises Unsupported where Triton's kernels cannot run."""
    if device == "cpu":
        raise Unsupported("attention = split_kv needs a GPU")
    try:
        from .attention import register
    except ImportError as error:
        raise Unsupported(f"attention = split_kv needs Triton: {error}") from error
    register()


def _empty_model(config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
                config, dtype=dtype, attn_implementation=attention
            )
    except (ImportError, ValueError) as error:  # transformers' words for an attention that this model or machine lacks
        raise Unsupported(str(error)) from error


def _check_quantized(config: Any, weights: str, lm_head: str, embeddings: str) -> Packing | None:
    """How the checkpoint packs its layers, if it does. Raises Unsupported where `weights` is for another checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    if weights != "checkpoint":
        if quantization is not None:
            raise Unsupported("the checkpoint is already quantized: only weights = checkpoint can load it")
        return None
    if quantization is None:
        raise Unsupported("weights = checkpoint is for checkpoints that are already quantized; this one is not")
    if lm_head not in ("bf16", "fp32") or embeddings != "device":
        raise Unsupported("a checkpoint that is already quantized keeps its own lm_head and embeddings")
    try:
        return read_packing(quantization)
    except UnreadablePacking as error:
        raise Unsupported(str(error)) from error


def _place_packed(
    model: PreTrainedModel,
    names: tuple[str, ...],
    tensors: _Tensors,
    packing: Packing,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Put packed layers in the place of linear ones: one product where their columns stand in the same order."""
    from .packed import Packed, packed_linear, read_packed, same_order

    parts: list[Packed] = []
    biases: list[torch.Tensor] = []
    sizes = []
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parts.append(read_packed(tensors.get, name, linear, packing, device))
        _place(linear, name, tensors, dtype, device)
        biases += [] if linear.bias is None else [linear.bias]
        sizes.append(linear.out_features)
    if len(parts) > 1 and same_order(parts):
        merged = Merged(packed_linear(parts, biases, dtype), sizes)
        for index, name in enumerate(names):
            _replace(model, name, Slice(merged, index))
        return
    for name in names:
        _replace(model, name, packed_linear([parts.pop(0)], [biases.pop(0)] if biases else [], dtype))


def _load_as_stored(folder: str | Path, attention: str, device: str) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": device}, attn_implementation=attention, use_safetensors=True, local_files_only=True
        )
    except ImportError as error:  # the method's own package is not installed
        raise Unsupported(str(error)) from error
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


class _Tensors:
    """The checkpoint's tensors by the model's own names, read one at a time."""

    def __init__(self, folder: Path, model: PreTrainedModel, packed: bool = False):
        self._files = dict(_tensor_files(folder))
        prefix = model.base_model_prefix + "."
        wanted = set(model.state_dict())
        if packed:
            linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
            wanted |= {f"{name}.{part}" for name in linears for part in PARTS}
        self._names = {}
        for name in self._files:
            for candidate in (name, prefix + name, name.removeprefix(prefix)):
                if candidate in wanted:
                    self._names[candidate] = name
                    break
        # Checkpoints whose tensors transformers renames or fuses while loading are read whole, in host memory.
        self._converted: dict[str, torch.Tensor] = {}
        missing = {name for name, _ in model.named_parameters()} - set(self._names) - set(model.all_tied_weights_keys)
        missing = {name for name in missing if not self.packs(name.removesuffix(".weight"))}
        if missing and packed:
            raise Unsupported(f"the checkpoint has no tensor for {min(missing)}")
        if missing:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
            whole, report = loaded
            if report["missing_keys"]:
                raise Unsupported(f"the checkpoint has no tensor for {min(report['missing_keys'])}")
            for name, stored, wanted_shape in sorted(report["mismatched_keys"]):
                raise Unsupported(f"{name} has shape {tuple(stored)}, the config says {tuple(wanted_shape)}")
            self._converted = whole.state_dict()

    def packs(self, name: str) -> bool:
        """Whether the linear layer of this name is stored in a quantized checkpoint's 4 bits."""
        return f"{name}.qweight" in self._names

    def get(self, name: str) -> torch.Tensor | None:
        from safetensors import safe_open

        if name in self._converted:
            return self._converted[name]
        stored = self._names.get(name)
        if stored is None:
            return None
        # Opened anew for each tensor: while a file stays mapped, every page once read counts as the process's memory.
        with safe_open(self._files[stored], framework="pt") as file:
            return file.get_tensor(stored)  # type: ignore[no-any-return]


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name, file in json.loads(index.read_text())["weight_map"].items():
            yield name, folder / Path(file).name
        return
    single = folder / "model.safetensors"
    if not single.exists():
        raise Unsupported(f"{folder} has no model.safetensors: only safetensors checkpoints are read")
    with safe_open(single, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, single


def _place(module: nn.Module, name: str, tensors: _Tensors, dtype: torch.dtype, device: str) -> None:
    """Give a module's own parameters and buffers their stored values on the device."""
    prefix = f"{name}." if name else ""
    for key, parameter in list(module.named_parameters(recurse=False)):
        stored = tensors.get(prefix + key)
        if stored is None:
            continue
        if stored.shape != parameter.shape:
            raise Unsupported(
                f"{prefix}{key} has shape {tuple(stored.shape)}, the config says {tuple(parameter.shape)}"
            )
        wanted = dtype if stored.is_floating_point() else stored.dtype
        # a copy, never a view of the mapped file: the file's pages would count as the process's memory
        value = stored.to(device=device, dtype=wanted, copy=True)
        module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    for key, buffer in list(module.named_buffers(recurse=False)):
        stored = tensors.get(prefix + key)
        module._buffers[key] = (buffer if stored is None else stored.to(buffer.dtype)).to(device)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _trim(device: str) -> None:
    """On a CPU the holes that quantizing leaves in the heap would count as the process's memory: give them back."""
    if device == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
