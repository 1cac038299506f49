"""Why each choice was made, read off the stored records: what was not measured is not guessed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from ..config import MIB, Record
from ..policy.compare import speedup
from .view import Answer, Html, View, describe, join, number, tag, words

_GB = 10**9  # bytes
_POINT = 0.01  # of quality loss: 1 %
_MATTERS = 0.05  # share of importance from which on a knob is named; chosen
_NO_FAULT = ("ok", "timeout", "unstable")


def why_section(view: View) -> Html:
    """Per context of the workload: the knobs that mattered, the runner-up, what was rejected, what more would buy."""
    parts = []
    for answer in view.answers:
        if answer.context in view.run.workload.contexts:
            facts = [join([tag("dt", name), tag("dd", *said)]) for name, said in _facts(view, answer)]
            title = "Why this one" if answer.chosen else "Why nothing"
            parts += [tag("h3", f"{title}, at {answer.context:,} tokens"), tag("dl", *facts, class_="why")]
    return join(parts)


def _facts(view: View, answer: Answer) -> Iterable[tuple[str, Sequence[object]]]:
    here = _as_they_stand(view, answer.context)
    yield "Knobs that mattered", [_knobs(view, answer.context)]
    yield "Runner-up", _runner_up(view, answer, here)
    yield "Rejected", _rejected(view, answer, here)
    more = view.run.budget.bytes + _GB
    held = [r for r in here if r.outcome == "over_budget" and (r.peak_bytes or more + 1) <= more and _good(view, r, 0)]
    yield "1 GB more buys", _gain(view, answer, held)
    lossy = [r for r in here if r.outcome == "quality_loss" and _good(view, r, _POINT)]
    yield "1 % more loss buys", _gain(view, answer, lossy)


def _as_they_stand(view: View, context: int) -> list[Record]:
    """A record for each configuration at this context: what failed once has failed."""
    failed = {
        record.configuration: record
        for record in view.run.records
        if record.context_tokens == context and record.outcome not in _NO_FAULT
    }
    return [failed.get(r.configuration, r) for r in view.records if r.context_tokens == context]


def _knobs(view: View, context: int) -> str:
    shares = view.run.importances.get(context)
    if not shares:
        return "Too few trials finished here to say."
    named = [f"{knob} {100 * share:.0f} %" for knob, share in shares.items() if share >= _MATTERS]
    return f"{', '.join(named)} of what set the faster half of the finished trials apart."


def _runner_up(view: View, answer: Answer, here: Sequence[Record]) -> list[object]:
    if answer.chosen is None:
        return ["Nothing is chosen here."]
    others = [r for r in here if r.outcome == "ok" and view.rate(r) and r.configuration != answer.chosen.configuration]
    if not others:
        return ["No other configuration that was measured here is feasible."]
    first = max(others, key=view.speed)
    same = [r for r in others if r.configuration.load_group == answer.chosen.configuration.load_group]
    if first in same:
        return ["Of this load and of all: ", *_compared(view, answer, first), "."]
    near = _compared(view, answer, max(same, key=view.speed)) if same else ["none that is feasible"]
    return ["Of this load: ", *near, ". Of all: ", *_compared(view, answer, first), "."]


def _compared(view: View, answer: Answer, other: Record) -> list[object]:
    """A feasible record beside the chosen, and why it was not chosen where it is no slower."""
    assert answer.chosen is not None
    ours, theirs = answer.chosen.configuration, other.configuration
    _, low, high = _ratio(view, answer.chosen, other)
    said = _named(view, answer, other)
    bound = not answer.kept and not view.run.info.get("reloads")
    if low > 1 and bound and ours.load_group != theirs.load_group:
        said += ["; but one load serves all contexts"]
    elif low <= 1 <= high and math.isfinite(high):
        if ours.load_group != theirs.load_group and bound:
            said += ["; the chosen load is simpler"] * (ours.load_group.simplicity < theirs.load_group.simplicity)
        else:
            said += ["; the chosen is simpler"] * (ours.simplicity < theirs.simplicity)
    return said


def _named(view: View, answer: Answer, record: Record) -> list[object]:
    """Its settings, its rate, and how far that is from the chosen's."""
    rate = [" with ", f"{number(view.rate(record))} {view.unit}"]
    if answer.chosen is None:
        return [tag("code", view.name(record.configuration)), *rate]
    chosen = answer.chosen.configuration
    stock = record.configuration == view.baselines.get(answer.context, view.baseline)
    name = "the baseline" if stock else tag("code", describe(record.configuration, chosen))
    return [name, *rate, f", {_gap(*_ratio(view, answer.chosen, record))}"]


def _gap(ratio: float, low: float, high: float) -> str:
    """How much faster or slower, in %, with the 95 % interval."""
    gain, least, most = (100 * (end - 1) for end in (ratio, low, high))
    if math.isinf(high):
        return f"{abs(gain):.1f} % {'faster' if gain > 0 else 'slower'}, too few rounds stored for an interval"
    if low > 1:
        return f"{gain:.1f} % faster ({least:.1f} to {most:.1f} %)"
    if high < 1:
        return f"{-gain:.1f} % slower ({-most:.1f} to {-least:.1f} %)"
    return f"a tie within error: {gain:+.1f} % ({least:+.1f} to {most:+.1f} %)"


def _ratio(view: View, ours: Record, theirs: Record) -> tuple[float, float, float]:
    """Theirs over ours with its interval: both as measured again, else as the search measured both, else by all."""
    for final in (True, False, None):
        a, b = _sound(view, ours, final), _sound(view, theirs, final)
        if a and b:
            return speedup(b, a, view.run.workload.objective)
    return view.speed(theirs) / view.speed(ours) if view.speed(ours) else math.inf, 0.0, math.inf


def _sound(view: View, record: Record, final: bool | None) -> list[Record]:
    """What was measured of the same thing; noise counts only where there is nothing but noise."""
    here = [r for r in view.run.records if r.context_tokens == record.context_tokens and r.samples and view.rate(r)]
    same = [r for r in here if r.configuration == record.configuration]
    sound = ("ok", "quality_loss", record.outcome)
    return [r for r in same if r.outcome in sound and final in (None, r.stage == "final")]


def _rejected(view: View, answer: Answer, here: Sequence[Record]) -> list[object]:
    """What was faster than the chosen and not feasible, and what failed without a rate."""
    bar, what = (view.speed(answer.chosen), "was faster") if answer.chosen else (0.0, "ran")
    failed = [record for record in here if record.outcome != "ok"]
    faster = [record for record in failed if view.speed(record) > bar]
    blank = [record for record in failed if not view.rate(record)]
    said: list[object] = [f"Nothing that {what}."]
    if faster:
        first = max(faster, key=view.speed)
        said = [f"Of what {what}, {_counts(faster)}. The fastest: ", *_named(view, answer, first)]
        said += [f". {words(first.outcome).capitalize()}: {first.reason or 'no reason stored'}."]
    return [*said, f" Failed before there was a rate: {_counts(blank)}."] if blank else said


def _counts(records: Iterable[Record]) -> str:
    return ", ".join(f"{n} {words(outcome)}" for outcome, n in Counter(r.outcome for r in records).most_common())


def _good(view: View, record: Record, more: float) -> bool:
    """Whether its quality was measured and would pass with so much more loss allowed."""
    limit = 1 + view.run.workload.max_quality_loss + more
    return record.perplexity_ratio is not None and record.perplexity_ratio <= limit


def _gain(view: View, answer: Answer, candidates: Sequence[Record]) -> list[object]:
    """The fastest of them, where it is faster than what was chosen."""
    bar = view.speed(answer.chosen) if answer.chosen else 0.0
    faster = [record for record in candidates if view.speed(record) > bar]
    if not faster:
        return ["Nothing that was measured."]
    record = max(faster, key=view.speed)
    loss = view.loss(record, "%")
    held = number(record.peak_bytes, "MiB", 1 / MIB)
    return [*_named(view, answer, record), f". It held {held}, quality loss {loss}."]
