"""What all of the engine stands on: its refusal, and the types that it computes in."""

from __future__ import annotations

import torch


class Unsupported(Exception):
    """This model, machine or combination cannot run it; the message says which and why."""


def full_precision(device: str) -> str:
    """The word for unquantized weights here: bf16, or fp32 on a processor without bf16 arithmetic."""
    if device != "cpu":
        return "bf16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def compute_dtype(weights: str, device: str) -> torch.dtype:
    word = weights if weights in ("bf16", "fp32") else full_precision(device)
    return torch.float32 if word == "fp32" else torch.bfloat16
