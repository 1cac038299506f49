"""Plants faults in a real worker and prints what each was caught as: the instruments, measured.

A budget is hard only if memory that no allocator governs counts, and a rate means something only if a lowered clock or
a busy machine shows. So each fault is planted where it would arise, in a fresh worker that measures the bundled pair as
a run does, and has to come back under its own name. The first row plants nothing and has to be `ok`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from autotune.config import MIB, Budget, Configuration, Record, Workload
from autotune.demo import DRAFT, TARGET
from autotune.trial import process
from autotune.trial.inputs import input_files, prepare_inputs, text_file
from autotune.trial.process import WorkerFailed
from autotune.trial.trials import Trials
from benchmarks.prepare import device_option, uncapped

FAULTY = Path(__file__).parents[1] / "tests" / "faulty_worker.py"
ROOM = 100 * MIB  # bytes that the budget leaves beside a measurement that went well
HELD = 200 * 10**6  # bytes of what is planted: more than ROOM
CONTEXT = 512  # tokens
WORKLOAD = Workload((CONTEXT,), new_tokens=32)
FILLER = "The quick brown fox jumps over the lazy dog. "
GPU_HOG = """
import sys
import torch
a = torch.randn(8192, 8192, device=sys.argv[1], dtype=torch.bfloat16)
while True:
    a = (a @ a).tanh()
    torch.cuda.synchronize(a.device)
    print(flush=True)
"""


@dataclass(frozen=True)
class Fault:
    """What is planted, and the outcome and a part of the reason that it has to be caught with."""

    name: str
    outcome: str
    reason: str = ""
    plant: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


FAULTS = (
    Fault("nothing", "ok"),
    Fault(
        "a cache that keeps rejected tokens",
        "wrong_output",
        "differs from plain decoding",
        {"do": "keep rejected tokens"},
        {"draft": str(DRAFT), "depth": 4},
    ),
    Fault("a cache that loses the last 8 tokens", "quality_loss", "perplexity", {"do": "lose the last 8 tokens"}),
    Fault("200 MB beside the allocator", "over_budget", "over the budget", {"do": "keep", "bytes": HELD}),
    Fault(
        "a spike of 20 ms over the budget",
        "over_budget",
        "over the budget",
        {"at": "generated", "do": "spike", "bytes": HELD},
    ),
    Fault("processors, or a GPU, busy with something else", "unstable", "busy with something else"),
    Fault("a clock that drops by a third halfway", "unstable", "clock", {"do": "lower the clock", "after": 5}),
)


class Bench:
    """The bundled pair's inputs and references in a folder, and records of workers with faults in them."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.room = 10**12  # bytes; until it is known what a measurement without a fault takes
        self.text = text_file(WORKLOAD, folder)
        with self.trials() as trials, uncapped(trials) as worker:
            self.environment = worker.request("environment", 120)
            prepare_inputs(worker, TARGET, WORKLOAD, self.text, folder, self.environment)

    def trials(self) -> Trials:
        trials = Trials(str(TARGET), WORKLOAD, Budget(self.room, self.device), self.folder)
        trials.inputs = input_files(self.folder, WORKLOAD)
        return trials

    def measure(self, fault: Fault) -> Record:
        """What a fresh worker with the fault in it comes back with."""
        if fault.plant:
            (self.folder / "fault.json").write_text(json.dumps({"at": "generate", **fault.plant}))
        precision = self.environment["full_precision"]
        configuration = Configuration(weights=precision, lm_head=precision, **fault.settings)
        with self.trials() as trials, busy(self.device) if "busy" in fault.name else contextlib.nullcontext():
            return trials.measure(configuration, CONTEXT, stage="final")

    def read_filler(self) -> tuple[str, str]:
        """The outcome and the reason when every prompt is filler."""
        prompts = self.folder / "filler.jsonl"
        prompts.write_text(json.dumps({"prompt": FILLER * 200}) + "\n")
        filled = replace(WORKLOAD, prompts=str(prompts))
        with self.trials() as trials, uncapped(trials) as worker:
            try:
                prepare_inputs(worker, TARGET, filled, self.text, self.folder, self.environment)
            except WorkerFailed as failure:
                return failure.outcome, failure.reason
        return "ok", ""


@contextlib.contextmanager
def busy(device: str) -> Iterator[None]:
    """Other processes that want every processor twice, or the whole GPU."""
    if device == "cpu":
        count = 2 * len(os.sched_getaffinity(0))
        command = [sys.executable, "-c", "while True: pass"]  # each in a session of its own: Linux shares among those
        hogs = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    else:
        hogs = [subprocess.Popen([sys.executable, "-c", GPU_HOG, device], stdout=subprocess.PIPE)]
        assert hogs[0].stdout is not None
        hogs[0].stdout.readline()
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@click.command()
@device_option
def main(device: str) -> None:
    """Plant every fault; the last line is one JSON object. Exit code 1 where one was not caught as what it is.

    Example: python -m benchmarks.planted_faults
    """
    rows: list[dict[str, Any]] = []

    def show(name: str, expected: str, outcome: str, reason: str, caught: bool) -> None:
        rows.append({"fault": name, "expected": expected, "outcome": outcome, "reason": reason, "caught": caught})
        click.echo(f"{name:<48}{outcome:<14}{'' if caught else 'NOT CAUGHT (' + expected + ')  '}{reason}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(FAULTY.parents[1]), *([inherited] if inherited else [])])
        os.environ |= {"FAULT": str(folder / "fault.json"), "PYTHONPATH": path}
        process.WORKER = (sys.executable, str(FAULTY))
        bench = Bench(folder, device)
        click.echo(f"{'planted':<48}{'outcome':<14}reason")
        for fault in FAULTS:
            record = bench.measure(fault)
            if fault.name == "nothing" and record.peak_bytes is not None:
                bench.room = record.peak_bytes + ROOM
            caught = record.outcome == fault.outcome and fault.reason in record.reason
            show(fault.name, fault.outcome, record.outcome, record.reason, caught)
        outcome, reason = bench.read_filler()
        show("prompts of filler", "unsupported", outcome, reason, "filler" in reason)
    caught = sum(row["caught"] for row in rows)
    figures = {"benchmark": "planted_faults", "device": device, "planted": len(rows), "caught": caught, "rows": rows}
    click.echo(json.dumps(figures))
    sys.exit(caught < len(rows))


if __name__ == "__main__":
    main()
