"""The page `report.html`: one file that opens offline, made of stored results only.

Whatever comes from outside (model names, reasons, versions) is text, never markup: `join` escapes all that is not
`Html`, the pictures' labels are escaped as they are made, and the page's content security policy lets it load nothing.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..config import MIB, OUTCOMES, Configuration, Record, mib
from .figures import context_figure, memory_section, pareto_section
from .view import (
    KNOBS,
    LOAD_KNOBS,
    Answer,
    Html,
    RunData,
    View,
    codes,
    join,
    knob_texts,
    number,
    quality_loss,
    tag,
    words,
)
from .why import why_section


def write_report(run: RunData, path: Path) -> None:
    """Write the page for `run` to `path`; it needs no network and no other file."""
    from plotly.offline import get_plotlyjs

    view = View(run)
    parts = {
        "title": join([f"autotune: {view.model}"]),
        "plotly": Html(f"<script>{get_plotlyjs()}</script>"),
        "facts": _facts(view),
        "headline": join([_headline(view)]),
        "answers": _answer_table(view),
        "why": why_section(view),
        "pareto": pareto_section(view),
        "contexts": context_figure(view),
        "memory": memory_section(view),
        "outcomes": _outcome_tables(view),
        "measurements": _measurement_table(view),
        "inputs": _input_table(view),
    }
    template = Template(resources.files("autotune.report").joinpath("template.html").read_text("utf-8"))
    path.write_text(template.substitute(parts), "utf-8")


# The answer -----------------------------------------------------------------------------------------------------------


def _facts(view: View) -> Html:
    info = view.run.info
    hardware = info.get("hardware")
    if isinstance(hardware, Mapping):
        hardware = next((hardware[key] for key in ("name", "gpu", "device", "cpu") if hardware.get(key)), None)
    so_far = "not ended: the best so far" if "ended" in info else None
    facts = [f"budget {mib(view.run.budget.bytes)}", view.run.budget.device, hardware, info.get("started"), so_far]
    return join([" · ".join(str(fact) for fact in facts if fact)])


def _headline(view: View) -> str:
    chosen = [answer for answer in view.answers if answer.chosen]
    answer = next((answer for answer in reversed(chosen) if answer.speedup), chosen[-1] if chosen else None)
    if answer is None or answer.chosen is None:
        fitting = sum(record.outcome == "ok" for record in view.records)
        nothing = f"Nothing that was measured fits {mib(view.run.budget.bytes)} and keeps its quality."
        return f"Nothing is chosen; {fitting} of {len(view.records)} measurements fit." if fitting else nothing
    record = answer.chosen
    said = [f"At {answer.context:,} tokens: {_comparison(answer)}", f"{number(view.rate(record))} {view.unit}"]
    said += [] if record.peak_bytes is None else [f"{record.peak_bytes / MIB:,.0f} of {view.budget:,.0f} MiB"]
    said += [] if record.perplexity_ratio is None else [f"quality loss {view.loss(record, '%')}"]
    gains = [a.speedup for a in chosen if a.speedup]
    over = f" Over all contexts: {min(gains):.1f}x to {max(gains):.1f}x." if len(gains) > 1 and max(gains) > 1 else ""
    alone = [f"{a.context:,}" for a in chosen if a.baseline and a.baseline.outcome != "ok" and a is not answer]
    return ", ".join(said) + "." + over + (f" The baseline does not run at {', '.join(alone)}." if alone else "")


def _comparison(answer: Answer) -> str:
    if answer.kept:
        return "the baseline is kept, for nothing that fits is measurably faster"
    if answer.speedup is None:
        outcome = answer.baseline.outcome if answer.baseline else "ok"
        return "no baseline to compare with" if outcome == "ok" else f"the baseline does not run ({words(outcome)})"
    return f"a tie with the baseline ({answer.speedup:.2f}x)" if answer.tie else f"{answer.speedup:.1f}x the baseline"


def _answer_table(view: View) -> Html:
    chosen = [answer.chosen.configuration for answer in view.answers if answer.chosen]
    shared = [k for k in LOAD_KNOBS if len({getattr(c, k) for c in chosen}) == 1]
    heads = ["#context", "~settings", f"#{view.unit}", "#against baseline", "#first token", "#footprint"]
    table = _table([*heads, "#quality loss", "#acceptance"], [_answer_row(view, a, shared) for a in view.answers])
    common = codes(knob_texts(chosen[0], shared)) if shared else ""
    return join([tag("p", "For every context: ", common) if shared else "", table])


def _answer_row(view: View, answer: Answer, shared: Sequence[str]) -> list[object]:
    context, record, note = tag("strong", f"{answer.context:,}"), answer.chosen, answer.rule.get("note")
    verdict = tag("span", answer.verdict, class_="tag good" if answer.gains else "tag")
    base = answer.baseline and view.rate(answer.baseline)
    against = join([verdict, tag("small", f"baseline {number(base)}") if base else ""])
    if record is None:
        return [
            context,
            note or ("no rule covers this context" if view.policy else "no policy yet"),
            "",
            against,
            "",
            "",
            "",
            "",
        ]
    settings = codes(knob_texts(record.configuration, [knob for knob in KNOBS if knob not in shared]))
    interval = view.interval(record)
    spread = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
    return [
        context,
        join([settings, tag("small", note) if note else ""]),
        join([number(view.rate(record)), tag("small", spread)]),
        against,
        number(record.ttft_s, "ms", 1000),
        _meter(view, record),
        view.loss(record, "%"),
        number(record.acceptance, "%", 100),
    ]


def _meter(view: View, record: Record) -> Html:
    share = (record.peak_bytes or 0) / view.run.budget.bytes
    bar = tag("div", tag("i", style=f"width:{min(share, 1):.1%}"), class_="meter over" if share > 1 else "meter")
    label = f"{100 * share:.0f} %"
    return join([number(record.peak_bytes, "MiB", 1 / MIB), *([tag("small", label), bar] if record.peak_bytes else [])])


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], class_: str = "scroll") -> Html:
    """A table; heads that begin with `#` stand over numbers, with `~` over long text."""
    kinds = [{"#": "number", "~": "wide"}.get(head[0], "text") for head in heads]
    top = [tag("th", head.lstrip("#~"), class_=kind) for head, kind in zip(heads, kinds, strict=True)]
    body = [tag("tr", *map(_cell, row, kinds)) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", *top)), tag("tbody", *body)), class_=class_)


def _cell(value: object, kind: str) -> Html:
    """A cell; a pair is a text with the number that it is sorted by."""
    if not isinstance(value, tuple):
        return tag("td", value, class_=kind)
    return tag("td", value[0], class_=kind, data_value=str(math.nan if value[1] is None else value[1]))


def _fold(summary: str, content: object) -> Html:
    return tag("details", tag("summary", summary), content)


def _outcome(outcome: str) -> Html:
    return tag("span", words(outcome), class_="tag good" if outcome == "ok" else "tag bad")


def _outcome_tables(view: View) -> Html:
    counts = Counter((record.outcome, record.context_tokens) for record in view.records)
    totals = Counter(record.outcome for record in view.records)
    rows = [
        [_outcome(outcome), *(counts[outcome, context] or "" for context in view.contexts), totals[outcome]]
        for outcome in OUTCOMES
        if totals[outcome]
    ]
    heads = ["outcome", *(f"#at {context:,}" for context in view.contexts), "#in all"]
    alike: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(view.records, key=lambda r: (OUTCOMES.index(r.outcome), r.context_tokens)):
        if record.outcome != "ok":
            alike[record.outcome, re.sub(r"\d[\d.,]*", "0", record.reason)].append(record)
    failed = [[_outcome(k[0]), *_failure(view, records)] for k, records in alike.items()]
    note = tag("p", "Reasons that differ in numbers only are counted together.", class_="note")
    table = _table(["outcome", "~the first one's reason", "#count", "~where"], failed)
    return join([_table(heads, rows), *([tag("h3", "What did not pass, by reason"), note, table] if failed else [])])


def _failure(view: View, records: Sequence[Record]) -> list[object]:
    """Reason, count and configurations of failures for the same reason; their own reasons where these differ."""
    differ, reason = len({record.reason for record in records}) > 1, records[0].reason or "no reason stored"
    where: dict[Configuration, list[Record]] = defaultdict(list)
    for record in records:
        where[record.configuration].append(record)
    items = [
        join([tag("code", view.name(configuration)), " at ", "; ".join(_place(record, differ) for record in found)])
        for configuration, found in where.items()
    ]
    listed = items[0] if len(items) == 1 else tag("ul", *(tag("li", item) for item in items))
    text = tag("code", reason)
    text = _fold(textwrap.shorten(reason, 120), text) if len(reason) > 160 else text
    return [text, len(records), _fold(f"{len(items)} configurations", listed) if len(items) > 3 else listed]


def _place(record: Record, with_reason: bool) -> str:
    return f"{record.context_tokens:,}" + (f" ({textwrap.shorten(record.reason, 100)})" if with_reason else "")


def _measurement_table(view: View) -> Html:
    ordered = sorted(view.run.records, key=lambda record: (record.context_tokens, -view.speed(record)))
    heads = ["#context", "outcome", "~settings, against the baseline", f"#{view.unit}", "#quality loss, %"]
    heads += [f"#{name}{unit and f', {unit}'}" for name, _, unit, _ in view.figures]
    table = _table([*heads, "#took, s", "stage"], [_measurement(view, record) for record in ordered], "scroll all")
    return _fold(
        f"{len(ordered)} measurements",
        join([tag("input", type="search", placeholder="filter, e.g. nf4 static"), table]),
    )


def _measurement(view: View, record: Record) -> list[object]:
    rate, loss, figures = (
        view.rate(record),
        quality_loss(record),
        [(getattr(record, k), scale) for _, k, _, scale in view.figures],
    )
    return [
        (f"{record.context_tokens:,}", record.context_tokens),
        _outcome(record.outcome),
        tag("code", view.name(record.configuration)),
        (number(rate), rate),
        (view.loss(record), loss),
        *((number(value, scale=scale), value) for value, scale in figures),
        (number(record.measure_s), record.measure_s),
        record.stage,
    ]


def _input_table(view: View) -> Html:
    inputs = {"workload": asdict(view.run.workload), "budget": asdict(view.run.budget), **view.run.info}
    return _table(["name", "~value"], [[tag("code", name), value] for name, value in _flat(inputs)])


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
