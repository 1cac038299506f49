"""The cap, and the footprint as the process itself sees it.

On a GPU the footprint is what NVML attributes to the process: the CUDA context, kernels' code, and everything that
PyTorch's allocator has reserved. The allocator's own limit (torch.cuda.set_per_process_memory_fraction) is set to the
budget minus the rest, before the first weight is read, and tightened when the rest grows.

On a CPU the footprint is the resident set. RLIMIT_DATA limits what may still be allocated: an allocation past it fails
in PyTorch with an ordinary exception, and the process stays usable. The kernel keeps the peak (VmHWM), which misses
nothing however short, and forgets it when 5 is written to clear_refs (Linux, proc(5)).
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import MIB, mib

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)'s words, by glibc's malloc.h


class Meter:
    """Holds this process to `budget_bytes` on `device`, which becomes the thread's current one, and reads its peaks."""

    def __init__(self, device: str, budget_bytes: int | None):
        self.device, self.budget = device, budget_bytes
        # Large blocks go back to the system when they are freed, so that one measurement does not weigh on the next.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * MIB)
        self.load_peak = 0
        # One core is left to everything else: with every core in use, each step waits for the slowest thread, and a
        # machine that does anything besides decodes ten times slower.
        if not self.is_cuda:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
        if self.is_cuda:
            # Kernels that do not ask where their tensors are go to the current device, and would make a context there.
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)  # creates the CUDA context
            torch.cuda.synchronize(device)
        self.base_bytes = self._outside()
        self.cap()

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def cap(self) -> None:
        """Leave to allocations what the budget leaves. Raises MemoryError where that is nothing."""
        if self.budget is None:
            return
        outside = self._outside()
        left = self.budget - outside
        if left <= 0:
            raise MemoryError(f"the process holds {mib(outside)} before any weight; the budget is {mib(self.budget)}")
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, left / total), self.device)
        else:
            limit = _status("VmData") + left
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))

    def begin(self) -> None:
        """Forget earlier peaks and give back what is not in use."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.cap()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peaks(self) -> dict[str, int | None]:
        """Peaks since `begin`, in bytes: the footprint, and what the allocator had in use and had reserved."""
        if not self.is_cuda:
            return {"peak_bytes": _status("VmHWM"), "peak_allocated_bytes": None, "peak_reserved_bytes": None}
        torch.cuda.synchronize(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        return {
            "peak_bytes": self._outside() + reserved,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": reserved,
        }

    def _outside(self) -> int:
        """What the process holds that the allocator does not govern; on a CPU, all that it holds now."""
        if not self.is_cuda:
            return _status("VmRSS")
        used = process_bytes(self.device, os.getpid())
        if used is None:  # NVML does not see this process (containers, WSL): a context's size as measured on an H100
            return 640 * 2**20
        return used - torch.cuda.memory_reserved(self.device)


def nvml_handle(device: str) -> Any:
    """NVML's handle of a CUDA device. By UUID: NVML's numbers know nothing of CUDA_VISIBLE_DEVICES."""
    import pynvml

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(int(device.partition(":")[2] or 0)).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def process_bytes(device: str, pid: int) -> int | None:
    """What NVML attributes to a process on a CUDA device, in bytes; None where it does not list the process."""
    import pynvml

    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(nvml_handle(device)):
        if process.pid == pid and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that an allocation failed, on the GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # the allocator's words, the operating system's (a file that cannot be mapped), and C++'s
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def module_bytes(module: nn.Module | None) -> int:
    """Bytes of the device storages behind a module's parameters and buffers, packed and nested ones included."""
    if module is None:
        return 0
    storages: dict[int, int] = {}
    int8: list[Any] = [
        part.state for part in module.modules() if hasattr(part, "state")
    ]  # has the scales after the first pass
    scales = [state.SCB for state in int8 if isinstance(getattr(state, "SCB", None), torch.Tensor)]
    for tensor in [*module.parameters(), *module.buffers(), *scales]:
        for part in _parts(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a quantized one (quanto's wrappers, bitsandbytes' statistics)."""
    parts: list[torch.Tensor] = []
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        parts += [value for value in (state.absmax, state.code, state.offset) if isinstance(value, torch.Tensor)]
        state = state.state2
    for name in ("SCB", "CB"):
        value = getattr(tensor, name, None)
        if isinstance(value, torch.Tensor):
            parts.append(value)
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            parts += _parts(getattr(tensor, name))
        return parts
    return [*parts, tensor]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
