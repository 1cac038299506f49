"""The parent's side of a measurement: start the worker, cap, watch, time out, kill; what comes back is a Record.

The worker is a process of its own in a session of its own, so that killing its group leaves nothing behind. It is kept
while the load group stays the same, and replaced after any failure that may have poisoned it. All along, a witness in
this process samples what the operating system (or, on a GPU, the driver) says that the worker holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ALLOCATOR, MIB, Budget, Configuration, LoadGroup, Outcome, Record, Workload, mib

STARTUP_S = 300.0
LOAD_S = 900.0
STABLE = 0.5  # standard deviation of the rounds' rates, relative to their median, above which a figure is no figure
BUSY = 0.25  # share of the time in which others kept the processors, or the GPU, from a measurement that counts
_LOOK, _CARE = (2, 6.0), (3, 10.0)  # least rounds and seconds of them: while searching, and for finalists
SPILL = 256 * MIB  # a CUDA context's size is known only so well where NVML does not tell it
SAMPLE_S = 0.004  # the witness looks this often: 250 Hz
WORKER = (sys.executable, "-m", "autotune.trial.worker")

Phase = Callable[[str], None]
_QUALITY = tuple(
    field.name
    for field in dataclasses.fields(Record)
    if field.name.startswith(("perplexity", "kl_", "top1_")) or field.name == "quality"
)
_TASK = tuple(field.name for field in dataclasses.fields(Record) if field.name.startswith("task_"))


class OurBug(Exception):
    """An exception that our own code did not mean to raise, with the worker's traceback."""


class WorkerFailed(Exception):
    """The worker answered with a failure, died or took too long."""

    def __init__(self, outcome: Outcome, reason: str, poisoned: bool = True):
        super().__init__(reason)
        self.outcome, self.reason, self.poisoned = outcome, reason, poisoned


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


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where a run's tokenized text and reference logits are. At a length without logits quality is not measured.

    `task` holds the questions with the reference's scores, where there is a task.
    """

    tokens: str
    references: dict[int, str]
    task: str | None = None


class Trials:
    """Measures configurations for one run. Use as a context manager; nothing outlives it."""

    def __init__(self, model: str, workload: Workload, budget: Budget, folder: Path, phase: Phase = lambda text: None):
        self.model, self.workload, self.budget, self.folder, self.phase = model, workload, budget, folder, phase
        self.inputs: Inputs | None = None
        self.loads = 0
        self._worker: WorkerProcess | None = None
        self._spare: WorkerProcess | None = None
        self._group: LoadGroup | None = None
        self._failed: dict[LoadGroup, WorkerFailed] = {}
        self._quality: dict[tuple[tuple[str, ...], int], dict[str, Any]] = {}
        self._answered: dict[tuple[str, ...], dict[str, Any]] = {}
        self._checked: set[tuple[Configuration, int]] = set()  # whose text was that of plain decoding for every prompt

    def learn(self, record: Record) -> None:
        """The same text at the same context has the same quality: it is measured once. So are a task's answers,
        which have nothing to do with the context."""
        if record.task_loss is not None:
            answered = {name: getattr(record, name) for name in _TASK}
            self._answered.setdefault(record.configuration.quality_key, answered)
        if record.perplexity_ratio is not None:
            key = (record.configuration.quality_key, record.context_tokens)
            self._quality.setdefault(key, {name: getattr(record, name) for name in _QUALITY})

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._spare is not None:
            self._spare.kill()

    def close(self) -> None:
        """End the worker; the next measurement starts in a fresh process."""
        if self._worker is not None:
            self._worker.kill()
        self._worker = self._group = None

    def _start(self, budget_bytes: int | None) -> WorkerProcess:
        """A fresh worker. On a GPU machine the one after it imports its libraries meanwhile; a CPU is left in peace."""
        spawn = self._spare or WorkerProcess(self.folder / "worker.log", self.phase)
        self._spare = None
        worker = spawn.start(self.budget.device, budget_bytes)
        if self.budget.device != "cpu":
            self._spare = WorkerProcess(self.folder / "worker.log", self.phase)
        return worker

    @property
    def group(self) -> LoadGroup | None:
        """The load group that is resident now."""
        return self._group

    def uncapped(self) -> WorkerProcess:
        """A worker that the budget does not bind: for the probe, the inputs and the reference."""
        return self._start(None)

    def measure(
        self,
        configuration: Configuration,
        context: int,
        *,
        timeout_s: float = 600,
        stage: str = "search",
        bar: float | None = None,
    ) -> Record:
        """One measured (configuration, context). Whatever goes wrong is the record's outcome, but for a bug of ours."""
        assert self.inputs is not None
        began = time.monotonic()
        careful = stage in ("final", "boundary")
        rounds, limit_s = _CARE if careful else _LOOK
        known = self._quality.get((configuration.quality_key, context))
        answered = self._answered.get(configuration.quality_key)
        try:
            worker = self._ready(configuration.load_group)
            assert worker.witness is not None
            worker.request("begin", timeout_s)  # gives back what the last one left, before the witness looks
            worker.witness.begin()
            answer = worker.request(
                "measure",
                timeout_s,
                configuration=dataclasses.asdict(configuration),
                context=context,
                new_tokens=self.workload.new_tokens,
                inputs=self.inputs.tokens,
                reference=self.inputs.references.get(context) if known is None else None,
                task=self.inputs.task if answered is None else None,
                careful=careful and (configuration, context) not in self._checked,
                min_rounds=rounds,
                limit_s=min(limit_s, timeout_s / 4),
                bar=bar,
            )
        except WorkerFailed as failure:
            if failure.poisoned:
                self.close()
            return Record(
                configuration,
                context,
                failure.outcome,
                failure.reason,
                measure_s=time.monotonic() - began,
                stage=stage,
            )
        seen = max(answer["peak_bytes"], worker.witness.peak, self._load_peak)
        answer |= {"peak_bytes": seen, "witness": worker.witness.instrument}
        answer |= (known or {}) | (answered or {})
        hidden = _spilled(answer, worker.witness.peak)
        outcome, reason = self._judge(answer, answer.pop("wrong_output"), answer.pop("drift", 1.0), hidden)
        record = Record(configuration, context, outcome, reason, stage=stage, **answer)
        if careful and outcome == "ok":
            self._checked.add((configuration, context))
        self.learn(record)
        return record

    def _ready(self, group: LoadGroup) -> WorkerProcess:
        """A worker that holds the load group."""
        if group in self._failed:
            raise self._failed[group]
        if self._worker is not None and self._group == group:
            return self._worker
        self.close()
        self.loads += 1
        try:
            self._worker = self._start(self.budget.bytes)
            answer = self._worker.request("load", LOAD_S, model=self.model, group=dataclasses.asdict(group))
        except WorkerFailed as failure:
            self.close()
            where = WorkerFailed(failure.outcome, f"while loading: {failure.reason}", poisoned=False)
            if failure.outcome != "timeout":
                self._failed[group] = where
            raise where from failure
        self._group = group
        assert self._worker.witness is not None
        self._load_peak = max(answer["peak_bytes"], self._worker.witness.peak)
        return self._worker

    def _judge(self, figures: dict[str, Any], wrong: str, drift: float = 1.0, spilled: int = 0) -> tuple[Outcome, str]:
        """The outcome of a measurement that ran, by measured constraints in the order of their gravity."""
        peak, ratio = figures["peak_bytes"], figures.get("perplexity_ratio")
        if peak > self.budget.bytes:
            return "over_budget", f"held {mib(peak)} at its peak, {mib(peak - self.budget.bytes)} over the budget"
        if spilled:
            return (
                "over_budget",
                f"{mib(spilled)} of its allocations were not on the device: they spilled to host memory",
            )
        if wrong:
            return "wrong_output", wrong
        if ratio is not None and not ratio <= 1 + self.workload.max_quality_loss:
            limit = self.workload.max_quality_loss
            return "quality_loss", f"perplexity is {ratio - 1:+.1%} of the reference's; the limit is {limit:+.1%}"
        if lost := lost_answers(figures.get("task_loss"), figures.get("task_loss_interval"), self.workload):
            return "quality_loss", lost
        unsteady = _unsteady(figures, drift)
        return ("unstable", f"{figures['tokens_per_s']:.1f} tokens/s, but {unsteady}") if unsteady else ("ok", "")


def lost_answers(loss: float | None, interval: tuple[float, float] | None, workload: Workload) -> str:
    """By how much a task's answers are worse than the workload allows; nothing where that may be chance."""
    if loss is None or interval is None or loss <= workload.max_task_loss or interval[0] <= 0:
        return ""
    low, high = (100 * end for end in interval)
    return (
        f"answers to the task are {100 * loss:.1f} points of F1 below the reference's (95 % interval {low:.1f} to "
        f"{high:.1f}); the limit is {100 * workload.max_task_loss:.1f}"
    )


def _spilled(figures: dict[str, Any], witnessed: int) -> int:
    """Bytes that PyTorch's allocator had reserved on the device, and that the device did not hold.

    Drivers for Windows, and so for WSL, move what does not fit to the host's memory and let the program go on, slowly
    (NVIDIA, "System Memory Fallback"). Memory that another process gave back meanwhile looks the same where only the
    whole device can be seen; less than SPILL says nothing.
    """
    missing = (figures.get("peak_reserved_bytes") or 0) + figures.get("base_bytes", 0) - witnessed
    return missing if figures.get("peak_reserved_bytes") and missing > SPILL else 0


def _unsteady(figures: dict[str, Any], drift: float) -> str:
    """Why a rate says nothing of the configuration, or nothing."""
    machine = figures.get("machine", {})
    before, after = machine.get("before", {}), machine.get("after", {})
    waiting, others = machine.get("waiting", 0.0), after.get("others_share") or 0.0
    if others > BUSY:
        return f"the GPU was busy with something else: other processes used {others:.0%} of its time"
    if waiting > BUSY:
        return (
            f"the processors were busy with something else: this process waited {waiting:.0%} of its time for one "
            f"(load {after['load_1m']:.1f})"
        )
    if drift < 1:
        clocks = (before.get("sm_clock_mhz"), after.get("sm_clock_mhz"))
        seen = f" The GPU's went from {clocks[0]} to {clocks[1]} MHz." if all(clocks) else ""
        return f"halfway its rounds fell by {1 - drift:.0%} and stayed there: was the clock lowered?{seen}"
    if figures["spread"] > STABLE:
        return f"rounds vary by {figures['spread']:.0%}: is something else running?"
    return ""
