"""Measure a policy again on this machine, each rule at its longest prompt, and compare with what it promises."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .config import Budget, Record, Workload, mib
from .policy import Policy, PolicyError, Rule, read_policy
from .run import fingerprint
from .trial import Inputs, Trials, WorkerFailed

SLACK = 0.15  # how far below its interval a rate may fall on the machine that measured it: other load, other clocks


@dataclass(frozen=True)
class Verdict:
    """One claim of a policy, checked."""

    claim: str
    holds: bool
    promised: str
    found: str


def verify_policy(path: Path, phase: Callable[[str], None] = lambda text: None) -> list[Verdict]:
    """A verdict per claim: the model's files, and per rule the footprint, the rate and the quality."""
    policy = read_policy(path)
    folder = Path(policy.model.path)
    if not folder.is_dir():
        raise PolicyError(f"{path}: model.path {folder} does not exist")
    verdicts = _model_verdicts(policy, folder)
    if not all(verdict.holds for verdict in verdicts):
        return verdicts
    device = str(policy.environment.get("device_word", "cpu"))
    knobs = {field.name for field in dataclasses.fields(Workload)}
    stored = {key: value for key, value in policy.workload.items() if key in knobs}
    workload = Workload(**{**stored, "contexts": tuple(rule.max_context_tokens for rule in policy.rules)})
    budget = Budget(policy.budget_bytes, device)
    with tempfile.TemporaryDirectory() as name, Trials(str(folder), workload, budget, Path(name), phase) as trials:
        here = _prepare(trials, policy, workload, Path(name))
        verdicts += [Verdict(f"{key}", True, str(old), str(new)) for key, old, new in _differences(policy, here)]
        for rule in policy.rules:
            record = trials.measure(policy.configuration(rule), rule.max_context_tokens, stage="final")
            verdicts += _rule_verdicts(rule, record, policy.budget_bytes, workload)
    return verdicts


def _model_verdicts(policy: Policy, folder: Path) -> list[Verdict]:
    now = fingerprint(folder)
    return [
        Verdict(name.replace("_", " "), promised == now[name], promised[:12], now[name][:12])
        for name, promised in (
            ("weights_sha256", policy.model.weights_sha256),
            ("tokenizer_sha256", policy.model.tokenizer_sha256),
        )
    ]


def _differences(policy: Policy, here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is not as it was when the policy was measured; said, but no failure by itself."""
    return [
        (f"environment: {key}", policy.environment.get(key), here.get(key))  # type: ignore[misc]
        for key in ("device", "driver", "versions")
        if policy.environment.get(key) != here.get(key)
    ]


def _prepare(trials: Trials, policy: Policy, workload: Workload, scratch: Path) -> dict[str, Any]:
    """The same text, cut the same way, scored by the same reference."""
    text = workload.text
    if text is None:
        from .demo import held_out_text

        text = str(scratch / "text.txt")
        Path(text).write_text(held_out_text(), encoding="utf-8")
    worker = trials.uncapped()
    try:
        here = worker.request("environment", 120)
        inputs = worker.request(
            "inputs",
            300,
            model=trials.model,
            text=text,
            prompts=workload.prompts,
            contexts=list(workload.contexts),
            windows=4,
            path=str(scratch / "inputs.npz"),
        )
        weights = "checkpoint" if policy.load.weights == "checkpoint" else here["full_precision"]
        worker.request("load_reference", 1800, model=trials.model, weights=weights)
        references = {context: str(scratch / f"reference-{context}.npy") for context in workload.contexts}
        for context, path in references.items():
            worker.request("reference", 1800, inputs=str(scratch / "inputs.npz"), context=context, path=path)
    except WorkerFailed as failure:
        raise PolicyError(f"preparing failed ({failure.outcome}): {failure.reason}") from None
    finally:
        worker.kill()
    trials.inputs = Inputs(str(scratch / "inputs.npz"), references)
    return {**here, "text_sha256": inputs["text_sha256"]}


def _rule_verdicts(rule: Rule, record: Record, budget_bytes: int, workload: Workload) -> list[Verdict]:
    name = f"up to {rule.max_context_tokens}"
    if record.tokens_per_s is None:
        return [Verdict(f"{name}: runs", False, "ok", f"{record.outcome}: {record.reason}")]
    low, high = rule.expected.tokens_per_s_interval
    peak, rate, ratio = record.peak_bytes or 0, record.tokens_per_s, record.perplexity_ratio
    verdicts = [
        Verdict(f"{name}: footprint", peak <= budget_bytes, f"within {mib(budget_bytes)}", mib(peak)),
        Verdict(f"{name}: tokens/s", rate >= low * (1 - SLACK), f"{low:.1f} to {high:.1f}", f"{rate:.1f}"),
    ]
    if ratio is not None:
        promised = rule.expected.perplexity_ratio_interval or (1.0, 1 + workload.max_quality_loss)
        most = max(promised[1], 1 + workload.max_quality_loss)
        verdicts.append(Verdict(f"{name}: quality loss", ratio <= most, f"at most {most - 1:.2%}", f"{ratio - 1:+.2%}"))
    if record.outcome in ("wrong_output", "unstable"):
        verdicts.append(Verdict(f"{name}: {record.outcome}", False, "ok", record.reason))
    return verdicts


def print_verdicts(verdicts: list[Verdict], as_json: bool) -> None:
    """A table, or JSON, of what holds and what does not."""
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "", "promised", "found", header_style="bold")
    for verdict in verdicts:
        changed = verdict.claim.startswith("environment")
        table.add_row(
            verdict.claim,
            "differs" if changed else "holds" if verdict.holds else "FAILS",
            verdict.promised,
            verdict.found,
        )
    Console().print(table)
