"""What each decoder layer keeps of the tokens that it has seen: keys and values, a state, both, or nothing.

The names and sizes of a layer's tensors say which, whatever words a config.json has for it:

- keys and values, for every token: as wide as what `k_proj` and `v_proj` (or one fused projection) make of a token;
- a latent, where attention is latent (DeepSeek-AI, arXiv 2405.04434): transformers caches the normalized latent as the
  keys of one head, and the rotated part that all heads share as its values;
- an index key, where few tokens are chosen to be attended to (DeepSeek-AI, arXiv 2512.02556): as wide as its norm;
- the last inputs of a short convolution, in the model's type, and a recurrent state, in float32: their sizes do not
  depend on the context. `A_log` is a tensor of every recurrent layer: a vector of heads for Mamba-2 (Dao and Gu, arXiv
  2405.21060) and for gated delta nets (Yang et al., arXiv 2412.06464), a matrix for Mamba (arXiv 2312.00752).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .folder import Tensor

_KEYS = re.compile(r"(?:^|\.)(?:k_proj|project_k|Wk|wk_dv)\.")
_VALUES = re.compile(r"(?:^|\.)(?:v_proj|v_proj_current|v_proj_delayed|project_v|Wv|wv_dv)\.")
_BOTH = re.compile(r"(?:^|\.)kv_proj\.")
_LATENT = re.compile(r"(?:^|\.)kv_a_proj_with_mqa\.")
_FUSED = re.compile(r"(?:^|\.)(?:query_key_value|qkv_proj|gqkv_proj|c_attn|Wqkv)\.")
_ELSEWHERE = re.compile(r"(?:^|\.)(?:cross_attn|cross_attention|crossattention|encoder_attn|indexer)\.")
_INDEX = re.compile(r"(?:^|\.)indexer\.k_(?:layer)?norm\.weight$")
_CONVOLUTION = re.compile(r"conv[^.]*\.weight$")
_OUT = re.compile(r"(?:^|\.)(?:out_proj|o_proj|dense)\.(?:packed\.)?weight$")


class Kept(NamedTuple):
    """One layer's share. Counts are elements: of keys, values and index keys per token, of a state in all."""

    keys: int = 0
    values: int = 0
    head_dims: tuple[int, int] = (0, 0)  # of a key and of a value
    conv: int = 0  # held in the model's type
    recurrent: int = 0  # held in float32
    index_keys: int = 0  # held in the model's type, whatever the cache


class Attention(NamedTuple):
    """What the config says of the model's attention, for layers whose tensors do not say it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kept(self) -> Kept:
        width = self.kv_heads * self.head_dim
        return Kept(width, width, (self.head_dim, self.head_dim))


def attends(tensors: Iterable[str]) -> bool:
    """Whether any of the named tensors makes keys."""
    return any(pattern.search(name) for name in tensors for pattern in (_KEYS, _LATENT, _FUSED, _BOTH))


def kept_by_layer(
    config: Mapping[str, Any], layers: Sequence[Mapping[str, Tensor]], attention: Attention, shared: int
) -> list[Kept]:
    """For each layer's tensors, by their names within it. The last `shared` layers read others' keys and values."""
    if not any(layers):
        return [attention.kept] * len(layers)
    found = [_kept(config, tensors, attention) for tensors in layers]
    if not any(kept.keys or kept.conv or kept.recurrent for kept in found):
        found = [attention.kept] * len(layers)  # its projections have names that are not known here
    # Layers that run several times, or share their attention's weights, have them in the file once.
    whole = max(found, key=lambda kept: kept.keys)
    kinds = config.get("layer_types") or config.get("layers_block_type") or [""] * len(layers)
    for i, (kind, tensors) in enumerate(zip(kinds, layers, strict=False)):
        if not tensors:
            found[i] = found[next(j for j, others in enumerate(layers) if others)]
        elif str(kind).startswith("hybrid") and not found[i].keys:
            found[i] = found[i]._replace(keys=whole.keys, values=whole.values, head_dims=whole.head_dims)
    alone = len(found) - shared
    return [*found[:alone], *(kept._replace(keys=0, values=0) for kept in found[alone:])]


def _kept(config: Mapping[str, Any], tensors: Mapping[str, Tensor], attention: Attention) -> Kept:
    states = [name.removesuffix("A_log") for name in tensors if name.rpartition(".")[2] == "A_log"]
    inside = {n: t for n, t in tensors.items() if any(n.startswith(state) for state in states)}
    outside = {n: t for n, t in tensors.items() if n not in inside and not _ELSEWHERE.search(n)}
    conv = sum(
        math.prod(tensor.shape)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 3 and tensor.shape[1] == 1 and _CONVOLUTION.search(name)
    )
    recurrent = sum(_recurrent(config, state, inside) for state in states)
    index = sum(tensor.shape[0] for name, tensor in tensors.items() if _INDEX.search(name))
    return _keys_and_values(config, outside, attention)._replace(conv=conv, recurrent=recurrent, index_keys=index)


def _keys_and_values(config: Mapping[str, Any], tensors: Mapping[str, Tensor], attention: Attention) -> Kept:
    def rows(pattern: re.Pattern[str]) -> list[int]:
        return [_rows(name, tensor, attention) for name, tensor in weights.items() if pattern.search(name)]

    weights = {n: t for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2 and t.dtype[0] in "FBP"}

    if latent := sum(rows(_LATENT)):
        rotated = latent * config["qk_rope_head_dim"] // (config["kv_lora_rank"] + config["qk_rope_head_dim"])
        return Kept(latent - rotated, rotated, (config["kv_lora_rank"], config["qk_rope_head_dim"]))
    queries = attention.heads * attention.head_dim
    keys, values, both = sum(rows(_KEYS)), sum(rows(_VALUES)), sum(rows(_BOTH))
    for name, tensor in weights.items():
        if _FUSED.search(name):
            both += _rows(name, tensor, attention) - queries * (2 if "gqkv_proj" in name else 1)
    if keys:
        values = values or keys  # the values are the keys where there is no projection for them
        norms = (tensor.shape[0] for name, tensor in tensors.items() if name.endswith("k_norm.weight") and tensor.shape)
        dim = next((size for size in norms if size and size < keys and keys % size == 0), attention.head_dim)
        dim = dim if keys % dim == 0 else keys // attention.kv_heads
        return Kept(keys, values, (dim, dim * values // keys))
    if both > 0:
        return attention.kept._replace(keys=both // 2, values=both // 2)
    return attention.kept if attends(tensors) else Kept()  # packed in a way that hides its size


def _rows(name: str, tensor: Tensor, attention: Attention) -> int:
    """Outputs of a projection, which GPT-2's layers have last."""
    rows, columns = tensor.shape
    return columns if "c_attn" in name and rows == attention.hidden else rows


def _recurrent(config: Mapping[str, Any], state: str, tensors: Mapping[str, Tensor]) -> int:
    decay = tensors[f"{state}A_log"].shape
    heads = math.prod(decay)
    if f"{state}D" in tensors and len(decay) > 1:
        return heads
    width = next(t.shape[-1] for n, t in tensors.items() if n.startswith(state) and _OUT.search(n))
    if f"{state}D" in tensors:
        return width * int(next(config[n] for n in ("mamba_d_state", "ssm_state_size", "state_size") if n in config))
    if "linear_key_head_dim" in config:
        return width * int(config["linear_key_head_dim"])
    return width * next(t.shape[0] for n, t in tensors.items() if n.startswith(state) and _KEYS.search(n)) // heads
