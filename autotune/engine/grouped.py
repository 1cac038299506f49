"""Attention for the few new tokens of a decode step on a CPU: the heads that share a KV head are rows of one product.

So each key is read once, and none is repeated for its heads. PyTorch's kernel takes 0.86 ms in bfloat16 for one query
a head over 2048 tokens (4 heads, 2 KV heads, one core of a Zen 5), and 0.13 ms for the same as two rows of a KV head.
What is computed is the same, by PyTorch's function for sdpa and by the model's own for eager.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

WORDS = {"sdpa": "grouped_sdpa", "eager": "grouped_eager"}  # our words for it among transformers', by the knob's
FEW = 32  # new tokens at most; more are a prompt's. Chosen, not measured: 1 and 5 were (benchmarks/LOG.md, "on a CPU")
_OTHER = ("softcap", "s_aux", "position_bias", "cache")  # what models of transformers may ask sdpa for besides

_Result = tuple[torch.Tensor, torch.Tensor | None]


def use_grouped(model: PreTrainedModel) -> None:
    """Let a model use this from now on, with the attention that it has; one of another kind stays as it is."""
    word = WORDS.get(str(model.config._attn_implementation))
    if word is None or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(WORDS["sdpa"], _sdpa)
    AttentionMaskInterface.register(WORDS["sdpa"], sdpa_mask)
    AttentionInterface.register(WORDS["eager"], _eager)
    AttentionMaskInterface.register(WORDS["eager"], eager_mask)
    attending = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
    if attending and all(map(_own, attending)):
        model.set_attn_implementation(word)


def _own(module: torch.nn.Module) -> Callable[..., _Result] | None:
    """The eager attention of the model's file, if it has one under transformers' usual name."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> _Result:
    if not _fits(query, attention_mask) or any(kwargs.get(name) is not None for name in _OTHER):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, mask = _grouped(query, key, attention_mask)
    if rows.shape[2] == 1:
        rows = rows.expand(-1, -1, 2, -1)  # a lone row is what takes so long
    output = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return _ungrouped(output, query).contiguous(), None


def _eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> _Result:
    own = _own(module)
    assert own is not None
    if not _fits(query, attention_mask) or hasattr(module, "sinks") or kwargs.get("s_aux") is not None:
        return own(module, query, key, value, attention_mask, **kwargs)
    rows, mask = _grouped(query, key, attention_mask)
    groups = module.num_key_value_groups
    module.num_key_value_groups = 1  # so that it repeats nothing
    try:
        # a product of parts of a longer cache is several times slower than the copy that repeating would be
        output, _ = own(module, rows, key.contiguous(), value.contiguous(), mask, **kwargs)
    finally:
        module.num_key_value_groups = groups
    return _ungrouped(output.transpose(1, 2), query).contiguous(), None


def _fits(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the new tokens are few, and one mask [batch, 1, n, tokens] says what all heads see."""
    return query.shape[2] <= FEW and (query.shape[2] == 1 if mask is None else mask.shape[1] == 1)


def _grouped(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The queries [batch, heads, n, head_dim] as [batch, kv_heads, heads / kv_heads * n, head_dim], and their mask."""
    batch, heads, tokens, dim = query.shape
    group = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], group * tokens, dim)
    return rows, mask if mask is None or tokens == 1 or group == 1 else mask.repeat(1, 1, group, 1)


def _ungrouped(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The rows' results as [batch, n, heads, head_dim]."""
    batch, heads, tokens, _ = query.shape
    rows = heads // output.shape[1] * tokens
    return output[:, :, :rows].reshape(batch, heads, tokens, output.shape[-1]).transpose(1, 2)
