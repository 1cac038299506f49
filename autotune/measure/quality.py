"""What a configuration loses: the same tokens after the same prefill, through its own cache, beside the reference.

A plain forward pass never reads a quantized cache. Here the context is prefilled in the configuration's chunks and the
tokens after it are scored a few at a time against the cache in use. Differences are paired token by token, which takes
the text's own variation out of the error; the interval is a block bootstrap, because neighbouring tokens' losses are
correlated (Politis & Romano, 1994).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

# Both chosen, not measured.
STEP = 32  # tokens scored per pass, as in a verification
BLOCK = 16  # tokens per bootstrap block


def compare(
    logits: list[torch.Tensor], reference: list[torch.Tensor], continuations: list[list[int]]
) -> dict[str, Any]:
    """The record's quality figures from logits [tokens, vocab] per window, of the configuration and the reference."""
    loss, base, divergence, agree = [], [], [], []
    for own, theirs, tokens in zip(logits, reference, continuations, strict=True):
        target = torch.tensor(tokens)[:, None]
        ours = torch.log_softmax(own.float(), dim=-1)
        other = torch.log_softmax(theirs.float(), dim=-1)
        loss.append(-ours.gather(1, target)[:, 0].numpy())
        base.append(-other.gather(1, target)[:, 0].numpy())
        divergence.append((other.exp() * (other - ours)).sum(-1).numpy())
        agree.append((ours.argmax(-1) == other.argmax(-1)).float().numpy())
    return _figures(*(np.stack(rows).astype(np.float64) for rows in (loss, base, divergence, agree)))


def _figures(loss: np.ndarray, base: np.ndarray, divergence: np.ndarray, agree: np.ndarray) -> dict[str, Any]:
    """From [windows, tokens] each."""
    low, high = _interval(loss - base)
    return {
        "perplexity": math.exp(loss.mean()),
        "perplexity_ratio": math.exp((loss - base).mean()),
        "perplexity_ratio_interval": (math.exp(low), math.exp(high)),
        "kl_divergence": float(divergence.mean()),
        "kl_divergence_p99": float(np.quantile(divergence, 0.99)),
        "top1_agreement": float(agree.mean()),
        "quality": {
            "tokens": int(loss.size),
            "windows": int(loss.shape[0]),
            "reference_perplexity": math.exp(base.mean()),
            "kl_divergence_interval": _interval(divergence),
            "top1_agreement_interval": _interval(agree),
        },
    }


def _interval(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """A 95 % interval of the mean of [windows, tokens] by resampling blocks of BLOCK neighbours."""
    windows, tokens = values.shape
    blocks = values[:, : tokens // BLOCK * BLOCK].reshape(windows * (tokens // BLOCK), BLOCK).mean(axis=1)
    chosen = np.random.default_rng(0).integers(0, len(blocks), size=(draws, len(blocks)))
    low, high = np.quantile(blocks[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
