"""Token embeddings that stay in host memory: a GPU reads the rows that it needs over the bus, a few kilobytes a token.

The table's pages are locked, so that the GPU can address them, where they lie (CUDA driver API, `cuMemHostRegister`).
So a step that is recorded holds the lookup as well, and nobody waits for the host to do it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from .support import Unsupported


class HostEmbedding:
    """Looks up token ids on the device in a table in host memory, as the model's own embedding would."""

    def __init__(self, table: nn.Module) -> None:
        self.table, self.scale = table, _scale(table)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids` [n], on their device, [n, hidden]."""
        from .kernels import gather

        rows = gather(self.table.weight, ids)  # type: ignore[arg-type]
        return rows if self.scale is None else rows * self.scale


def lock_pages(table: nn.Module, device: str) -> None:
    """Let the device read the table where it lies, for as long as it lives. Raises Unsupported."""
    _scale(table)
    weight: Any = table.weight
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(weight.data_ptr(), weight.nbytes, 0)
    if int(status):
        raise Unsupported(f"embeddings = host needs {weight.nbytes:,} bytes of memory that can be locked: {status}")
    weakref.finalize(table, torch.cuda.cudart().cudaHostUnregister, weight.data_ptr())


def _scale(table: nn.Module) -> float | None:
    """What the model multiplies its embeddings by, in their own precision. Raises Unsupported for anything else."""
    if type(table) is nn.Embedding:
        return None
    scale = getattr(table, "embed_scale", None)
    if scale is None or not isinstance(table, nn.Embedding):
        raise Unsupported(f"embeddings = host cannot look up in a {type(table).__name__}")
    return float(torch.as_tensor(scale).to(table.weight.dtype))
