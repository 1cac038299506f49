"""The chosen configurations as rules, with what was measured of each.

A rule ends at a length at which its settings were measured: at a context, or between two at a boundary that bisection
found. It says what it gains over the baseline, and names what ties with it, whatever that loads. A chunk that the
prompts of a context fit is written as a whole prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..config import (
    Budget,
    Configuration,
    Objective,
    Record,
    Workload,
    median_error,
    per_round,
)
from .choice import maximized, rivals, settle, tied, tied_loads
from .compare import as_done, broken, carried_out, compare, evidence_of, sound, soundly_again, speedup, t95, within
from .policy import (
    Baseline,
    Evidence,
    Expected,
    ModelInfo,
    Policy,
    Rule,
    Tie,
    Unrestricted,
    load_of,
    settings_of,
    to_configuration,
)

TASK_FIGURES = ("task_exact_match", "task_f1", "task_f1_interval", "task_loss")
_NAMED = 2  # ties that a rule's note has in words; chosen


def make_policy(
    records: list[Record],
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    *,
    workload: Workload,
    budget: Budget,
    model: dict[str, Any],
    environment: dict[str, Any],
    workload_info: dict[str, Any],
    reloads: bool = False,
    drafts: Iterable[dict[str, Any]] = (),
) -> Policy | None:
    """The policy of what `settle` leaves of the chosen configurations, a rule for each.

    Rests on the records of stage `final` where there are some. None where nothing is feasible.
    """
    records, baselines, finalists = as_done(records), carried_out(baselines), carried_out(chosen)
    chosen = settle(records, chosen, baselines, workload, reloads)
    if not chosen:
        return None
    default = load_of(chosen[max(chosen)])
    rules: list[Rule] = []
    for context in sorted(chosen):
        ours = chosen[context]
        group = finalists[context].load_group if reloads else ours.load_group
        ties = tied(records, group, context, workload.objective, beside=ours, any_load=not reloads)
        rule = _rule(records, ours, baselines.get(context), context, workload)
        rule.ties = _ties(records, ours, ties, context, workload.objective)
        rule.note += _ties_note(rule, ours, baselines.get(context))
        rule.note += _boundary_note(records, chosen, context, workload)
        rule.load = None if load_of(chosen[context]) == default else load_of(chosen[context])
        rules.append(rule)
    if not reloads:
        rules[0].note += _loads_note(records, chosen, baselines, workload)
    if any(rule.load for rule in rules):
        for rule in rules:
            loads = [r.load_s for r in evidence_of(records, chosen[rule.max_context_tokens], rule.max_context_tokens)]
            rule.reload_s = statistics.median([seconds for seconds in loads if seconds is not None] or [0.0])
    stock = [
        Baseline(
            context_tokens=context,
            load=load_of(configuration),
            settings=settings_of(configuration),
            expected=expected_of(evidence_of(records, configuration, context)),
        )
        for context, configuration in sorted(baselines.items())
    ]
    return Policy(
        model=ModelInfo(**model),
        drafts=[ModelInfo(**draft) for draft in drafts if draft["path"] in {c.draft for c in chosen.values()}],
        budget_bytes=budget.bytes,
        environment=environment,
        workload={**workload_info, "maximized": maximized(workload)},
        load=default,
        rules=rules,
        baseline=stock,
    )


def _loads_note(
    records: list[Record], chosen: dict[int, Configuration], baselines: dict[int, Configuration], workload: Workload
) -> str:
    ours, note = Configuration(**vars(chosen[max(chosen)].load_group)), ""
    over = "over all contexts, " * (sum(context in workload.contexts for context in chosen) > 1)
    for group, gain in tied_loads(records, chosen, baselines, workload):
        loads = Configuration(**vars(group)).differs_from(ours)
        note += f"; {over}loading {loads} instead ties ({gain:.2f} times as fast), and the simpler load stands"
    return note


def _rule(
    records: list[Record],
    configuration: Configuration,
    baseline: Configuration | None,
    context: int,
    workload: Workload,
) -> Rule:
    evidence = evidence_of(records, configuration, context)
    ratio, low, high = compare(records, configuration, baseline, context, workload.objective)
    unrestricted = _unrestricted(records, configuration, context, workload.objective)
    if context not in workload.contexts:
        note = "the same settings as at the context below, whose reach was measured"
    elif baseline is None:
        note = "nothing stock fits the budget here"
    elif configuration == baseline:
        note = "the baseline: nothing measured was significantly faster"
    elif low > 1:
        note = f"{ratio:.2f} times the baseline, 95 % interval {low:.2f} to {high:.2f}"
    elif high < 1:
        note = f"slower than the baseline here ({ratio:.2f}); it is the price of one load for all contexts"
    else:
        note = f"a tie with the baseline ({ratio:.2f}, 95 % interval {low:.2f} to {high:.2f})"
    if unrestricted is not None:
        other = to_configuration(unrestricted.load, unrestricted.settings)
        again = soundly_again(records, other, context)
        gain, (least, _) = unrestricted.gain, unrestricted.gain_interval or (0, 0)
        if again:
            gain, least, _ = compare(records, other, configuration, context, workload.objective)
        if least > 1:
            note += f"; alone, {other.differs_from(configuration)} would be {gain:.2f} times as fast"
            note += "" if again else ", by the search's records, which were not measured again"
    compared = baseline is not None and math.isfinite(high)
    return Rule(
        max_context_tokens=context,
        settings=settings_of(configuration),
        expected=expected_of(evidence),
        speedup=ratio if compared else None,
        speedup_interval=(low, high) if compared else None,
        tie=compared and low <= 1 <= high,
        note=note,
        evidence=Evidence(
            stage=evidence[0].stage,
            measurements=len(evidence),
            witness=evidence[0].witness,
            context_tokens=context,
            new_tokens=workload.new_tokens,
        ),
        unrestricted=unrestricted,
    )


def _ties(
    records: list[Record], ours: Configuration, finals: list[Configuration], context: int, objective: Objective
) -> list[Tie]:
    """What tied with ours in the finals, then what was not measured again and looked alike in the search."""
    looks = [r for r in records if r.stage in ("search", "baseline") and r.context_tokens == context and r.tokens_per_s]
    again = {r.configuration for r in records if r.stage == "final" and r.context_tokens == context}
    others = [c for c in rivals(looks, ours, context, objective) if c not in again and ours in again]
    alike = [c for c in others if within(compare(looks, c, ours, context, objective))]
    found = []
    for other, basis in [*((c, records) for c in finals if c != ours), *((c, looks) for c in alike)]:
        gain, low, high = compare(basis, other, ours, context, objective)
        evidence = evidence_of(basis, other, context)
        tie = Tie(
            load=load_of(other),
            settings=settings_of(other),
            tokens_per_s=expected_of(evidence).tokens_per_s,
            gain=gain,
            gain_interval=(low, high) if math.isfinite(high) else None,
            stage=evidence[0].stage,
        )
        found.append(tie)
    return found


def _ties_note(rule: Rule, ours: Configuration, baseline: Configuration | None) -> str:
    """The first few of its ties in words; `ties` has them all. A baseline that is one is what the note begins with."""
    others = [(to_configuration(tie.load, tie.settings), tie) for tie in rule.ties]
    others = [(other, tie) for other, tie in others if not (rule.tie and other == baseline)]
    note = ""
    for other, tie in others[:_NAMED]:
        searched = ", in the search" * (tie.stage != "final")
        note += f"; a tie with {other.differs_from(ours)} ({tie.gain:.2f} times as fast{searched})"
    more = len(others) - _NAMED
    return note + (f"; and {more} more tie{'s' * (more > 1)}" if more > 0 else "")


def _unrestricted(
    records: list[Record], configuration: Configuration, context: int, objective: Objective
) -> Unrestricted | None:
    """The context's fastest in the search beside the same search's figure for this configuration."""
    searched = [record for record in sound(records, context) if record.stage in ("search", "baseline")]
    ours = [record for record in searched if record.configuration == configuration]
    if not ours:
        return None
    best = max(searched, key=lambda record: record.rate(objective))
    gain, low, high = speedup([best], ours, objective) if best not in ours else (1.0, 1.0, 1.0)
    return Unrestricted(
        load=load_of(best.configuration),
        settings=settings_of(best.configuration),
        tokens_per_s=best.tokens_per_s or 0,
        gain=gain,
        gain_interval=(low, high) if math.isfinite(high) else None,
        stage=best.stage,
    )


def _boundary_note(records: list[Record], chosen: dict[int, Configuration], context: int, workload: Workload) -> str:
    """How well it is known where this rule takes over from the one before, where that has other settings."""
    before = max((c for c in chosen if c < context), default=None)
    if before is None or chosen[before] == chosen[context].at(before):
        return ""
    tried = [r for r in records if r.stage == "boundary" and r.configuration == chosen[context]]
    between = sorted({r.context_tokens for r in tried if before < r.context_tokens < context})
    if not between and before in workload.contexts:
        return f"; it takes over after {before} tokens, as where between {before} and {context} was not measured"
    note = f"; the change lies between {before} and {between[0] if between else context} tokens"
    failed = [length for length in between if chosen[context] in broken(records, length)]
    return note + (f"; it failed at {', '.join(map(str, failed))} tokens" if failed else "")


def expected_of(evidence: list[Record]) -> Expected:
    """Medians; the rate's over the rounds of all records together, with its interval; the highest footprint of any."""
    with_quality = next((r for r in evidence if r.perplexity_ratio is not None), evidence[0])
    with_task = next((r for r in evidence if r.task_f1 is not None), evidence[0])

    def middle(name: str) -> float:
        return float(statistics.median(getattr(record, name) for record in evidence))

    rate, interval = middle("tokens_per_s"), None
    rounds = [rate for record in evidence for rate in per_round(record.samples, "tokens_per_s")]
    if len(rounds) > 1:
        rate = statistics.median(rounds)
        half = t95(len(rounds) - 1) * median_error(rounds)
        interval = max(0.0, rate - half), rate + half
    return Expected(
        tokens_per_s=rate,
        tokens_per_s_interval=interval,
        decode_tokens_per_s=middle("decode_tokens_per_s"),
        ttft_s=middle("ttft_s"),
        peak_bytes=max(record.peak_bytes or 0 for record in evidence),
        perplexity_ratio=with_quality.perplexity_ratio,
        perplexity_ratio_interval=with_quality.perplexity_ratio_interval,
        acceptance=evidence[0].acceptance,
        **{name: getattr(with_task, name) for name in TASK_FIGURES},
    )
