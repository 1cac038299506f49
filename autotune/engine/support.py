"""What all of the engine stands on: its refusal, the types that it computes in, and the group of its 4-bit weights."""

from __future__ import annotations

import torch

from ..model.stored import QUANTO_GROUP

INT4_GROUP = QUANTO_GROUP  # weights along the input that share a scale in our own 4-bit layers, as in quanto's


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
