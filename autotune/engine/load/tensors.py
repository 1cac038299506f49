"""The tensors of a checkpoint's safetensors files, by the model's own names, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...model.folder import INDEX, SINGLE, same_tensor
from ...model.loaded import TOWER
from ...model.stored import PARTS
from ..support import Unsupported


class Tensors:
    """The checkpoint's tensors by the model's own names, read one at a time."""

    def __init__(self, folder: Path, model: PreTrainedModel, packed: bool = False):
        self._folder = folder
        self._files = dict(_tensor_files(folder))
        prefix = model.base_model_prefix + "."
        wanted = set(model.state_dict())
        if packed:
            linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
            wanted |= {f"{name}.{part}" for name in linears for part in PARTS}
        self._names = {}
        for name in self._files:
            text = _text_name(name)
            for candidate in (name, prefix + name, name.removeprefix(prefix), text, prefix + text):
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
            self._converted = {_text_name(name): tensor for name, tensor in whole.state_dict().items()}

    def packs(self, name: str) -> bool:
        """Whether the linear layer of this name is stored in a quantized checkpoint's 4 bits."""
        return f"{name}.qweight" in self._names

    def differ(self, one: str, other: str) -> bool:
        """Whether the checkpoint has both tensors, with values of their own."""
        if one not in self._names or other not in self._names:
            return False
        return not same_tensor(self._folder, self._names[one], self._names[other])

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


def _text_name(name: str) -> str:
    """What a tensor of a multimodal model's text tower is called in the tower's own model."""
    return TOWER.sub(r"\1", name, count=1)


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    if (folder / SINGLE).is_file():  # before an index, as transformers takes them
        with safe_open(folder / SINGLE, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, folder / SINGLE
        return
    if not (folder / INDEX).is_file():
        raise Unsupported(f"{folder} has no {SINGLE}: only safetensors checkpoints are read")
    for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
        yield name, folder / Path(file).name
