"""Put stored values, or another module, where a module of an empty model stands."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

from ..support import Unsupported
from .tensors import Tensors


def place(module: nn.Module, name: str, tensors: Tensors, dtype: torch.dtype, device: str) -> None:
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


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def trim(device: str) -> None:
    """On a CPU the holes that quantizing leaves in the heap would count as the process's memory: give them back."""
    if device == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
