"""A worker to plant faults in: started in the real one's place, it does what the file named by FAULT says, once.

With LIGHT in the environment it loads no model and answers with invented figures, so that what the parent does with a
process can be tested in a moment; else everything but the fault is the real worker.
"""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.config import parse_bytes
from autotune.trial import worker

FIGURES = {
    "peak_bytes": 1,
    "tokens_per_s": 10.0,
    "spread": 0.01,
    "tokens_per_s_interval": (9.9, 10.1),
    "perplexity_ratio": 1.0,
    "wrong_output": "",
}


class Light(worker.Worker):
    """Everything of the worker but the model."""

    def preload(self) -> dict[str, Any]:
        return {}

    def start(self, **_: Any) -> dict[str, Any]:
        _act(self, "start")
        return {"base_bytes": 0, "gpu_uuid": None}

    def load(self, **_: Any) -> dict[str, Any]:
        _act(self, "load")
        return {"peak_bytes": 1}

    def begin(self) -> dict[str, Any]:
        return {}

    def measure(self, **_: Any) -> dict[str, Any]:
        return FIGURES | (_act(self, "measure") or {})


class Faulty(worker.Worker):
    """The real worker, with a fault inside the measured generation."""

    def measure(self, **request: Any) -> dict[str, Any]:
        generate = self.engine.generate

        self.generations = 0

        def faulty(*args: Any) -> Any:
            _act(self, "generate")
            self.generations += 1
            generation = generate(*args)
            _act(self, "generated")
            return generation

        self.engine.generate = faulty
        try:
            return super().measure(**request)
        finally:
            del self.engine.generate


def _act(own: worker.Worker, place: str) -> dict[str, Any] | None:
    """Do what the fault file says for this place, and remove it; returns figures to answer with."""
    path = Path(os.environ["FAULT"])
    if not path.exists() or (fault := json.loads(path.read_text()))["at"] != place:
        return None
    path.unlink()
    match fault["do"]:
        case "answer":
            return dict(fault["figures"])
        case "hang":
            child = subprocess.Popen(["sleep", "600"])
            Path(fault["pid"]).write_text(str(child.pid))
            time.sleep(600)
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            print("the last words", file=sys.stderr)
            os._exit(3)
        case "print":
            print('rubbish {"event": "done"}\n' * 1000, flush=True)
            os.write(1, b"\xff\xfe{}\n")
            os.write(2, b'{"event": "failed"}\n')
        case "write to the pipe":
            os.write(own._events.fileno(), fault["text"].encode("latin-1") + b"\n")
            time.sleep(600)
        case "raise":
            raise RuntimeError(fault["text"])
        case "have a bug":
            parse_bytes("no size")
        case "eat":
            import torch

            torch.ones(fault["bytes"], dtype=torch.uint8)
        case "hold":
            held = bytearray(fault["bytes"])
            time.sleep(0.3)
            del held
        case "spike":
            held = _beside_the_allocator(own, fault["bytes"])
            time.sleep(0.02)
            held()
        case "keep":
            _beside_the_allocator(own, fault["bytes"])
        case "leave behind":
            import torch

            left = {"bytes": torch.ones(fault["bytes"], dtype=torch.uint8)}
            left["self"] = left  # type: ignore[assignment] # a cycle: held until the collector runs
        case "keep rejected tokens":
            from autotune.engine import runner

            runner.rollback = lambda cache, rejected: None
        case "lose the last 8 tokens":
            _lose_tokens()
        case "lower the clock":
            _lower_the_clock(own, fault["after"], fault.get("share", 0.5), fault.get("step_s", 0.0))
    return None


def _beside_the_allocator(own: worker.Worker, size: int) -> Callable[[], None]:
    """Takes memory that no allocator's limit governs; returns what gives it back."""
    if getattr(own, "device", "cpu") == "cpu":
        shared = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        for page in range(0, size, mmap.PAGESIZE):
            shared[page] = 1
        _KEPT.append(shared)
        return lambda: _KEPT.pop().close()
    driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    if error := driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)):
        raise RuntimeError(f"cuMemAlloc answered {error}")
    return lambda: driver.cuMemFree_v2(pointer)


_KEPT: list[mmap.mmap] = []


def _lose_tokens() -> None:
    """Every cache loses the 8 tokens that it stored last."""
    from autotune.engine import runner

    settle = runner.settle

    def lossy(cache: Any) -> None:
        settle(cache)
        for layer in cache.layers:
            end = getattr(layer, "recent", layer.get_seq_length())
            layer.keys[:, :, max(0, end - 8) : end] = 0
            layer.values[:, :, max(0, end - 8) : end] = 0

    runner.settle = lossy


def _lower_the_clock(own: Any, after: int, share: float, step_s: float) -> None:
    """From a generation on, every step takes that share longer: half as long again is a clock lowered by a third.

    And no less than `step_s`, which makes the slow steps all alike on a machine where others run.
    """
    forward, ended = own.engine.target.forward, time.perf_counter()

    def slower(*args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        output = forward(*args, **kwargs)
        if own.generations > after:
            took = time.perf_counter() - ended
            time.sleep(max(took * share, step_s - took))
        ended = time.perf_counter()
        return output

    own.engine.target.forward = slower


if __name__ == "__main__":
    worker.Worker = Light if "LIGHT" in os.environ else Faulty  # type: ignore[misc]
    worker.main()
