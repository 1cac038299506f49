"""The outside witness: what the operating system or the driver says that a process holds, sampled all along."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

SAMPLE_S = 0.004  # seconds from look to look: 250 Hz; chosen, not measured


class Witness(threading.Thread):
    """Samples a process's footprint from outside; `peak` is the most it saw since `begin`, in bytes."""

    def __init__(self, pid: int, gpu: str | None):
        super().__init__(daemon=True)
        self.pid, self.peak, self.samples, self.instrument = pid, 0, 0, "none"
        self._read = self._nvml_reader(gpu) if gpu else self._resident_reader()
        self._done = threading.Event()

    def _resident_reader(self) -> Callable[[], int]:
        page = os.sysconf("SC_PAGE_SIZE")
        path = Path(f"/proc/{self.pid}/statm")
        self.instrument = "resident set"
        return lambda: int(path.read_text().split()[1]) * page

    def _nvml_reader(self, gpu: str) -> Callable[[], int]:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        listed = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        if self.pid in listed:
            self.instrument = "NVML, per process"

            def of_process() -> int:
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == self.pid:
                        return int(process.usedGpuMemory or 0)
                return 0

            return of_process
        # Containers and WSL hide process numbers: what the whole device holds beyond what it held before.
        self.instrument = "NVML, whole device minus what it held before"
        before = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) - before

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            try:
                seen = self._read()  # first: `begin` may come meanwhile, and what it forgets must not come back
                self.peak = max(self.peak, seen)
            except (FileNotFoundError, ProcessLookupError):
                return
            self.samples += 1

    def begin(self) -> None:
        self.peak = self.samples = 0

    def stop(self) -> None:
        self._done.set()
