"""Tiny GPTQ and AWQ checkpoints, packed as the packages that write them do, beside what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that the i-th half byte of a word holds


def pack(numbers: torch.Tensor, places: tuple[int, ...] = tuple(range(8)), less: int = 0) -> torch.Tensor:
    """int32 [rows, n / 8] of 4-bit numbers [rows, n] (int64), `less` taken from every word."""
    eights = numbers.unflatten(1, (-1, 8))
    words = torch.stack([eights[..., place] << 4 * i for i, place in enumerate(places)]).sum(dim=0) - less
    return ((words + 2**31) % 2**32 - 2**31).int()


def quantize(weight: torch.Tensor, groups: torch.Tensor, sym: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], float16 scales [out, groups] and zeros; `groups` [in] says which group an input is in."""
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.int64), [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group]
        low, high = part.amin(dim=1, keepdim=True).clamp(max=0), part.amax(dim=1, keepdim=True).clamp(min=0)
        scale = (2 * torch.maximum(-low, high) / 15 if sym else (high - low) / 15).half()
        zero = torch.full_like(low, 8) if sym else (-low / scale.float()).round().clamp(0, 15)
        codes[:, groups == group] = (part / scale.float() + zero).round().clamp(0, 15).long()
        scales.append(scale)
        zeros.append(zero.long())
    return codes, torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


def packed_tensors(
    name: str, linear: nn.Linear, config: dict[str, Any], groups: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors that a layer is stored as; its weight becomes what they stand for."""
    codes, scales, zeros = quantize(linear.weight, groups, bool(config.get("sym")))
    if config.get("checkpoint_format") == "gptq":
        zeros[0, 0] = 0  # GPTQModel's first format borrows from the neighbours
    linear.weight.copy_((codes - zeros[:, groups]) * scales.float()[:, groups])
    tensors = {"scales": scales.T.contiguous()}
    if config["quant_method"] == "awq":
        tensors["qweight"] = pack(codes.T, AWQ_PLACES)
        tensors["qzeros"] = pack(zeros.T, AWQ_PLACES)
    else:
        tensors["qweight"] = pack(codes).T.contiguous()
        v1 = config.get("checkpoint_format", "gptq") == "gptq"
        tensors["qzeros"] = pack(zeros.T, less=0x11111111 if v1 else 0)
        tensors["g_idx"] = groups.int()
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def save_packed(
    model: PreTrainedModel,
    folder: Path,
    *,
    shards: int = 1,
    plain: tuple[str, ...] = ("lm_head",),
    **quantization: Any,
) -> PreTrainedModel:
    """Write `model` with its linear layers packed, but for those named; it becomes what the checkpoint holds."""
    config = {"bits": 4, "group_size": 32, **quantization}
    tensors: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for seed, (name, linear) in enumerate(modules.items()):
        if type(linear) is nn.Linear and not any(word in name for word in plain):
            size = linear.in_features if config["group_size"] == -1 else config["group_size"]
            groups = torch.arange(linear.in_features) // size
            if config.get("desc_act"):
                seed = seed if config.get("orders_differ") else linear.in_features
                groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
            tensors |= packed_tensors(name, linear, config, groups)
    config.pop("orders_differ", None)
    for name, tensor in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if f"{name.removesuffix('.weight')}.qweight" not in tensors and not tied:
            tensors[name] = tensor.copy_(tensor.half()).half()
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "dtype": "float16", "quantization_config": config}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return model
    names = sorted(tensors)
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}  # a layer's parts are apart
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return model
