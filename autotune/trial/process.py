"""A worker as its parent sees it: started, asked one thing at a time over a pipe of its own, timed out, killed.

The worker is a process of its own in a session of its own, so that killing its group leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ALLOCATOR, Outcome
from .witness import Witness

STARTUP_S = 300.0  # seconds of either step; chosen: 14 to 18 s were seen, nearly all of it imports (benchmarks/LOG.md)
WORKER = (sys.executable, "-m", "autotune.trial.worker")
Phase = Callable[[str], None]


class OurBug(Exception):
    """An exception that our own code did not mean to raise, with the worker's traceback."""


class WorkerFailed(Exception):
    """The worker answered with a failure, died or took too long."""

    def __init__(self, outcome: Outcome, reason: str, poisoned: bool = True):
        super().__init__(reason)
        self.outcome, self.reason, self.poisoned = outcome, reason, poisoned


class WorkerProcess:
    """A running worker: one request at a time, events read as they come."""

    def __init__(self, log: Path, phase: Phase):
        self.phase, self.log = phase, log
        to_child, ours_out = os.pipe()
        ours_in, from_child = os.pipe()
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR),
            "BITSANDBYTES_NOWELCOME": "1",
        }
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*WORKER, str(to_child), str(from_child)],
                pass_fds=(to_child, from_child),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env=environment,
            )
        os.close(to_child)
        os.close(from_child)
        self._out, self._in, self._buffer = ours_out, ours_in, b""
        self.witness: Witness | None = None
        self._send("preload", {})  # imports while the parent does something else; `start` waits for it

    def start(self, device: str, budget_bytes: int | None) -> WorkerProcess:
        """Cap the process on its device and begin to watch it."""
        try:
            self._answer("preload", STARTUP_S)
            self.hello = self.request("start", STARTUP_S, device=device, budget_bytes=budget_bytes)
        except BaseException:
            self.kill()
            raise
        self.witness = Witness(self.process.pid, self.hello.get("gpu_uuid"))
        self.witness.start()
        return self

    def request(self, op: str, timeout_s: float, **data: Any) -> dict[str, Any]:
        """The worker's answer. Raises WorkerFailed, or OurBug with the worker's traceback."""
        self._send(op, data)
        return self._answer(op, timeout_s)

    def _send(self, op: str, data: dict[str, Any]) -> None:
        try:
            os.write(self._out, (json.dumps({"op": op, **data}) + "\n").encode())
        except BrokenPipeError:
            raise WorkerFailed("crashed", self._epitaph()) from None

    def _answer(self, op: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            event = self._next(deadline, timeout_s, op)
            match event.pop("event"):
                case "phase":
                    self.phase(event["text"])
                case "done":
                    return event
                case "failed":
                    if event["outcome"] == "bug":
                        raise OurBug(event["trace"])
                    raise WorkerFailed(event["outcome"], event["reason"], event["poisoned"])

    def _next(self, deadline: float, timeout_s: float, op: str) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                self.kill()
                raise WorkerFailed("timeout", f"{op} took longer than {timeout_s:.0f} s")
            received = os.read(self._in, 2**20)
            if not received:
                raise WorkerFailed("crashed", self._epitaph())
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            self.kill()
            raise WorkerFailed("crashed", f"the worker sent what is no event: {line[:80]!r}")
        return event

    def _epitaph(self) -> str:
        """How the process ended, and the last line that it wrote."""
        self.kill()
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the worker {how}" + (f": {lines[-1][:200]}" if lines and code > 0 else "")

    def kill(self) -> None:
        if self._out == -1:  # killed before: its number may be another process's by now
            return
        if self.witness is not None:
            self.witness.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._out)
        os.close(self._in)
        self._out = self._in = -1
