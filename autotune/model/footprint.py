"""The footprint of a configuration by owner, in bytes, as the formulas have it before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..config import MIB, Configuration, draft_head
from .activations import peak_bytes, prefill_bytes, slack_bytes
from .folder import PlanError
from .kv_cache import cache_element_bytes, kv_by_layer
from .shape import ModelShape
from .weights import block_bytes, element_bytes, model_bytes

# Bytes of code that CUDA loads as it is first used, after the base was read: 76 to 82 MiB on an H200, with bnb-int8 140
# and more (benchmarks/recorded/plan-error-h200/first.txt).
KERNELS = {"cuda": 80 * MIB, "cpu": 0}
INT8_KERNELS = 60 * MIB
# Bytes of an allocator's segment that is used in part; on a CPU, of the code and the kernels of the first pass. Chosen
# to suit the same records and those of a CPU that are not kept (benchmarks/LOG.md, "Predicting the footprint").
FRAGMENTS = {"cuda": 20 * MIB, "cpu": 32 * MIB}


@dataclass(frozen=True)
class Prediction:
    """Bytes on the device by owner, bytes on the host, and the floor of one decode step in seconds.

    With speculation the floor is that of one verification, without the drafting.
    """

    owners: dict[str, int]
    host_bytes: int
    kv_bytes_per_token: int
    decode_floor_s: float | None = None

    @property
    def total(self) -> int:
        return sum(self.owners.values())


def footprint(
    target: ModelShape,
    draft: ModelShape | None,
    configuration: Configuration,
    context: int,
    new_tokens: int,
    device: str,
    base_bytes: int,
) -> Prediction:
    """By the formulas alone, at `context` prompt tokens and `new_tokens` more.

    `base_bytes` is what the process holds on the device before any weight. Raises PlanError where a draft's shape is
    missing.
    """
    if configuration.has_draft_model and draft is None:
        raise PlanError(f"the shape of the draft {configuration.draft} is needed; give its folder")
    c, kind, tokens = configuration, device.partition(":")[0], context + new_tokens + configuration.depth
    weights, head, embeddings, host = model_bytes(target, c.weights, c.lm_head, c.embeddings)
    held = kv_by_layer(target, c, tokens, c.weights)
    kv = sum(sorted(held)[-2:]) if c.cache == "offloaded" else sum(held)  # one layer in use, the next on its way
    drafted = draft_kv = 0
    if draft is not None and c.has_draft_model:
        *resident, on_host = model_bytes(draft, c.draft_weights, draft_head(c.draft_weights, kind), c.embeddings)
        drafted, host = sum(resident), host + on_host
        draft_kv = sum(kv_by_layer(draft, c, tokens, c.draft_weights))
    prefill = prefill_bytes(target, c, context, tokens, kind)
    activations = peak_bytes(target, draft, c, context, tokens, prefill, kv, draft_kv, kind)
    slack = FRAGMENTS[kind] + slack_bytes(target, c, context, tokens, prefill, activations, kv, draft_kv, kind)
    owners = {
        "base": base_bytes + KERNELS[kind] + (INT8_KERNELS if (c.weights, kind) == ("bnb-int8", "cuda") else 0),
        "weights": weights,
        "lm_head": head,
        "embeddings": embeddings,
        "draft": drafted,
        "kv_cache": kv,
        "draft_kv_cache": draft_kv,
        "activations": activations,
        "slack": slack,
    }
    per_token = sum(layer.kv_elements for layer in target.layers) * cache_element_bytes(target, c.cache, c.weights)
    return Prediction(owners, host + sum(held) - kv, round(per_token))


class LayerRow(NamedTuple):
    """One layer's bytes, wherever they are held."""

    layer: int
    weights_bytes: int
    kv_bytes: int


def by_layer(target: ModelShape, configuration: Configuration, context: int, new_tokens: int) -> list[LayerRow]:
    """A row per decoder layer of the target."""
    c, element = configuration, element_bytes(target, configuration.weights)
    held = kv_by_layer(target, c, context + new_tokens + c.depth, c.weights)
    return [
        LayerRow(i, block_bytes(layer, c.weights, element), kv_bytes)
        for i, (layer, kv_bytes) in enumerate(zip(target.layers, held, strict=True))
    ]
