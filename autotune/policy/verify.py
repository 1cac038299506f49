"""Measure a policy again on this machine, each rule at its longest prompt, and compare with what it promises.

The footprint must stay within the budget. The rate must reach the lower end of the certificate's interval, less SLACK;
the perplexity must not exceed the upper end of its own, nor the workload's limit; answers to the workload's task must
keep to its limit. An interval that does not hold its
own median was edited: then the strictest of the three numbers counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Budget, Record, Workload, mib
from ..model.fingerprint import fingerprint
from ..trial.inputs import input_files, prepare_inputs, text_file
from ..trial.process import WorkerFailed
from ..trial.trials import Trials, lost_answers
from .policy import Policy, PolicyError, Rule

# All chosen, not measured.
SLACK = 0.15  # share by which a rate may fall below its interval: other load, other clocks
WIDEST = 0.5  # an interval's lower end counts as at least this share of its median: [0, high] promises something too
ROUNDING = 0.002  # how far past its interval a perplexity ratio may be: other kernels round differently

Say = Callable[[str], None]


@dataclass(frozen=True)
class Difference:
    """What is not as it was when the policy was measured; said before anything is, but no failure by itself."""

    what: str
    measured: str
    here: str

    def __str__(self) -> str:
        return f"{self.what} differs: {self.measured} when it was measured, {self.here} here"


@dataclass(frozen=True)
class Verdict:
    """One claim of a policy, checked. `found` says by how much it fails."""

    claim: str
    holds: bool
    promised: str
    found: str


@dataclass(frozen=True)
class Verification:
    """One round: a verdict per file of the models, and per rule the footprint, the rate and the quality."""

    differences: list[Difference]
    verdicts: list[Verdict]

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """What differs first, then whether all holds, then every claim."""
        return {
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
            "holds": self.holds,
            "claims": [dataclasses.asdict(verdict) for verdict in self.verdicts],
        }

    def line(self) -> str:
        """One line for a person: how many claims hold, and each that fails."""
        failed = [verdict for verdict in self.verdicts if not verdict.holds]
        if not failed:
            return f"all {len(self.verdicts)} claims hold"
        said = "; ".join(f"{v.claim}: promised {v.promised}, found {v.found}" for v in failed)
        return f"{len(failed)} of {len(self.verdicts)} claims FAIL: {said}"


def verify_policy(path: Path, phase: Say = lambda text: None, note: Say = lambda text: None) -> Verification:
    """One round. `note` is told of every difference before anything is measured.

    Raises PolicyError for a policy that cannot be measured here.
    """
    rounds = verify_rounds(path, phase, note)
    try:
        return next(rounds)
    finally:
        rounds.close()


def verify_rounds(path: Path, phase: Say, note: Say) -> Generator[Verification]:
    """Round after round. Where a model's files are not those that were measured, nothing is run."""
    policy = Policy.load(path)
    for info in (policy.model, *policy.drafts):
        if not Path(info.path).is_dir():
            raise PolicyError(f"{path}: the model folder {info.path} does not exist: edit its path")
    knobs = {field.name for field in dataclasses.fields(Workload)}
    stored = {key: value for key, value in policy.workload.items() if key in knobs}
    workload = Workload(**{**stored, "contexts": tuple(rule.max_context_tokens for rule in policy.rules)})
    with tempfile.TemporaryDirectory() as name:
        differences, files = _prepare(policy, workload, Path(name), phase, note)
        while True:
            verdicts = list(files)
            if all(verdict.holds for verdict in files):
                verdicts += _measure(policy, workload, Path(name), phase)
            yield Verification(differences, verdicts)
            files = _file_verdicts(policy, phase)


def _prepare(
    policy: Policy, workload: Workload, scratch: Path, phase: Say, note: Say
) -> tuple[list[Difference], list[Verdict]]:
    """Look at the machine, then at the files; then cut the same text and score the same reference as the run did."""
    try:
        text = text_file(workload, scratch)
        digest = hashlib.sha256(text.read_text(encoding="utf-8").encode()).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"workload.text {workload.text} cannot be read: {error}") from None
    try:
        task = hashlib.sha256(Path(workload.task).read_bytes()).hexdigest() if workload.task else None
    except OSError as error:
        raise PolicyError(f"workload.task {workload.task} cannot be read: {error}") from None
    model = Path(policy.model.path)
    with _trials(policy, workload, scratch, phase) as trials:
        try:
            worker = trials.uncapped()
        except WorkerFailed as failure:
            was = policy.environment.get("device")
            raise PolicyError(
                f"the policy was measured on {was}; {trials.budget.device} cannot be used here: {failure.reason}"
            ) from None
        try:
            here = worker.request("environment", 120)
            differences = _differences(policy, {**here, "text_sha256": digest, "task_sha256": task})
            for difference in differences:
                note(str(difference))
            files = _file_verdicts(policy, phase)
            if all(verdict.holds for verdict in files):
                prepare_inputs(worker, model, workload, text, scratch, here)
        except WorkerFailed as failure:
            raise PolicyError(f"preparing failed ({failure.outcome}): {failure.reason}") from None
        finally:
            worker.kill()
    return differences, files


def _trials(policy: Policy, workload: Workload, scratch: Path, phase: Say) -> Trials:
    budget = Budget(policy.budget_bytes, str(policy.environment.get("device_word", "cpu")))
    return Trials(policy.model.path, workload, budget, scratch, phase)


def _differences(policy: Policy, here: dict[str, Any]) -> list[Difference]:
    """What the policy says of its machine, libraries and text that is otherwise here."""

    def stated(environment: dict[str, Any]) -> dict[str, Any]:
        flat = {key: environment[key] for key in ("device", "cores", "driver") if key in environment}
        return flat | {f"version of {name}": found for name, found in environment.get("versions", {}).items()}

    then, now = stated(policy.environment), stated(here)
    for what in ("text", "task"):
        if (key := f"{what}_sha256") in policy.workload:
            then[what], now[what] = policy.workload[key][:12], str(here[key])[:12]
    return [
        Difference(what, str(value), str(now.get(what, "none")))
        for what, value in then.items()
        if value != now.get(what)
    ]


def _file_verdicts(policy: Policy, phase: Say) -> list[Verdict]:
    """Whether every file of the models is the one that was measured."""
    verdicts = []
    for role, info in (("model", policy.model), *(("draft", draft) for draft in policy.drafts)):
        now = fingerprint(Path(info.path), phase)["files"]
        if not info.files:
            verdicts.append(Verdict(f"{role}: files", True, "unknown: an earlier version wrote it", "not compared"))
        for name in sorted(info.files | now):
            was, found = info.files.get(name, "no file"), now.get(name, "no file")
            if info.files:
                verdicts.append(Verdict(f"{role}: {name}", was == found, was[:12], found[:12]))
    return verdicts


def _measure(policy: Policy, workload: Workload, scratch: Path, phase: Say) -> list[Verdict]:
    """Every rule at its longest prompt with all new tokens, under the cap, in fresh processes."""
    verdicts = []
    with _trials(policy, workload, scratch, phase) as trials:
        trials.inputs = input_files(scratch, workload)
        for rule in policy.rules:
            record = trials.measure(policy.configuration(rule), rule.max_context_tokens, stage="final")
            verdicts += _rule_verdicts(rule, record, policy.budget_bytes, workload)
    return verdicts


def _rule_verdicts(rule: Rule, record: Record, budget: int, workload: Workload) -> list[Verdict]:
    name, expected = f"up to {rule.max_context_tokens}", rule.expected
    short = record.outcome in ("out_of_memory", "over_budget")
    short |= record.tokens_per_s is None and expected.peak_bytes > budget  # libraries may crash where memory runs out
    peak = max(record.peak_bytes or 0, expected.peak_bytes)  # the certificate's own counts: it was that high once
    held = mib(record.peak_bytes) if record.peak_bytes else f"{record.outcome}: {record.reason}"
    if expected.peak_bytes > max(budget, record.peak_bytes or 0):
        held += f"; {mib(expected.peak_bytes)} when it was measured"
    held += (
        f", {mib(peak - budget)} over" if peak > budget else f"; {record.reason}" if short and record.peak_bytes else ""
    )
    verdicts = [Verdict(f"{name}: footprint", peak <= budget and not short, f"within {mib(budget)}", held)]
    if record.tokens_per_s is None:
        if not short:
            verdicts = [Verdict(f"{name}: runs", False, "ok", f"{record.outcome}: {record.reason}")]
        return verdicts
    low, high = _promised(expected.tokens_per_s, expected.tokens_per_s_interval, max)
    least = max(low, WIDEST * expected.tokens_per_s) * (1 - SLACK)
    rate = f"{record.tokens_per_s:.1f}"
    if record.tokens_per_s < least:
        rate += f", {1 - record.tokens_per_s / least:.0%} under the least that passes, {least:.1f}"
    promised = f"{expected.tokens_per_s:.1f} ({low:.1f} to {high:.1f})"
    verdicts.append(Verdict(f"{name}: tokens/s", record.tokens_per_s >= least, promised, rate))
    if record.perplexity_ratio is not None:
        most, ratio = 1 + workload.max_quality_loss, record.perplexity_ratio
        if expected.perplexity_ratio is not None:
            _, high = _promised(expected.perplexity_ratio, expected.perplexity_ratio_interval, min)
            most = min(most, high + ROUNDING)
        loss = f"{ratio - 1:+.2%}" + (f", {ratio - most:.2%} over" if ratio > most else "")
        verdicts.append(Verdict(f"{name}: quality loss", ratio <= most, f"at most {most - 1:+.2%}", loss))
    if record.task_loss is not None:
        lost = lost_answers(record.task_loss, record.task_loss_interval, workload)
        promised = f"at most {100 * workload.max_task_loss:.1f} points"
        verdicts.append(
            Verdict(f"{name}: task loss", not lost, promised, lost or f"{100 * record.task_loss:.1f} points")
        )
    if record.outcome in ("wrong_output", "unstable"):
        verdicts.append(Verdict(f"{name}: {record.outcome}", False, "ok", record.reason))
    return verdicts


def _promised(
    median: float, interval: tuple[float, float] | None, strictest: Callable[[Iterable[float]], float]
) -> tuple[float, float]:
    low, high = interval or (median, median)
    if low <= median <= high:
        return low, high
    return (strictest([low, median, high]),) * 2


def print_verdicts(verification: Verification) -> None:
    """A table of what holds and what does not."""
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "", "promised", "found", header_style="bold")
    for verdict in verification.verdicts:
        table.add_row(verdict.claim, "holds" if verdict.holds else "FAILS", verdict.promised, verdict.found)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
