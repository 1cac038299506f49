"""A worker to plant faults in: started in the real one's place, it does what the file named by FAULT says, once.

With LIGHT in the environment it loads no model and answers with invented figures, so that what the parent does with a
process can be tested in a moment; else everything but the fault is the real worker.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from autotune import worker
from autotune.config import parse_bytes

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

    def measure(self, **_: Any) -> dict[str, Any]:
        return FIGURES | (_act(self, "measure") or {})


class Faulty(worker.Worker):
    """The real worker, with a fault inside the measured generation."""

    def measure(self, **request: Any) -> dict[str, Any]:
        generate = self.engine.generate

        def faulty(*args: Any) -> Any:
            _act(self, "generate")
            return generate(*args)

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
            with mmap.mmap(-1, fault["bytes"], mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as shared:
                for page in range(0, fault["bytes"], mmap.PAGESIZE):
                    shared[page] = 1
                time.sleep(0.02)
    return None


if __name__ == "__main__":
    worker.Worker = Light if "LIGHT" in os.environ else Faulty  # type: ignore[misc]
    worker.main()
