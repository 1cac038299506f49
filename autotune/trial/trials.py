"""The trials of a run: a load group handed to a worker under the cap, what came back judged; the answer is a Record.

A worker is kept while the load group stays the same, and replaced after any failure that may have poisoned it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ..config import MIB, Budget, Configuration, LoadGroup, Outcome, Record, Workload, mib
from .inputs import Inputs, score_reference
from .process import Phase, WorkerFailed, WorkerProcess

# All chosen, not measured beside others.
LOAD_S = 900.0  # seconds of a load; 8 to 33 s were seen of an 8B (benchmarks/LOG.md, "What a sweep costs")
STABLE = 0.5  # standard deviation of the rounds' rates, relative to their median, above which a figure is no figure
# Share of the time in which others kept the processors, or the GPU, from a measurement that counts, at most. A planted
# busy GPU gave 0.8 (benchmarks/recorded/planted-faults-h200.txt).
BUSY = 0.25
_LOOK, _CARE = (2, 6.0), (3, 10.0)  # least rounds, and seconds after which there are no more: looks, finals
SPILL = 256 * MIB  # bytes; a CUDA context's size is known only so well where NVML does not tell it

_QUALITY = tuple(
    field.name
    for field in dataclasses.fields(Record)
    if field.name.startswith(("perplexity", "kl_", "top1_")) or field.name == "quality"
)
_TASK = tuple(field.name for field in dataclasses.fields(Record) if field.name.startswith("task_"))


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

    def score(self, lengths: list[int], weights: str, facts: dict[str, Any]) -> dict[int, str]:
        """Score the reference at further lengths too; returns the file of each. Raises WorkerFailed."""
        assert self.inputs is not None
        paths = {length: str(self.folder / f"reference-{length}.npy") for length in lengths}
        self.close()
        worker = self.uncapped()
        try:
            score_reference(worker, Path(self.model), weights, Inputs(self.inputs.tokens, paths), facts)
        finally:
            worker.kill()
        self.inputs.references.update(paths)
        return paths

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
