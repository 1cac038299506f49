"""The page `report.html`: one file that opens offline, made of stored results only.

Whatever comes from outside (model names, reasons, versions) is text, never markup: `_join` escapes all that is not
`_Html`, the pictures' labels are escaped as they are made, and the page's content security policy lets it load nothing.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from autotune.config import (
    MIB,
    OUTCOMES,
    Budget,
    Configuration,
    LoadGroup,
    Objective,
    Record,
    Workload,
    mib,
    within_noise,
)

_KNOBS = tuple(f.name for f in fields(Configuration))
_LOAD_KNOBS = tuple(f.name for f in fields(LoadGroup))
_RATES: dict[Objective, tuple[str, str, str]] = {  # unit, figure, interval
    "end-to-end": ("tokens/s", "tokens_per_s", "tokens_per_s_interval"),
    "decode": ("decode tokens/s", "decode_tokens_per_s", "decode_tokens_per_s_interval"),
    "ttft": ("first tokens/s", "ttft_s", "ttft_s_interval"),
}
_FIGURES = (  # name, field of a record, unit, scale
    ("first token", "ttft_s", "ms", 1000),
    ("acceptance", "acceptance", "%", 100),
    ("footprint", "peak_bytes", "MiB", 1 / MIB),
    ("KL divergence", "kl_divergence", "", 1),
    ("top-1 agreement", "top1_agreement", "%", 100),
)
_TASK_FIGURES = (("task exact match", "task_exact_match", "%", 100), ("task F1", "task_f1", "%", 100))
_INK, _FAINT, _GRID, _CHOSEN, _FAILED = "#1f2933", "#9aa5b1", "#e4e7eb", "#c2410c", "#8a4b3c"
# Lightness falls steadily, so that it reads without colour as well.
_FOOTPRINT = [[0, "#b8e0d2"], [0.35, "#52a9b5"], [0.7, "#2a6496"], [1, "#241a54"]]
_LINES = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b61a8")  # Okabe and Ito's, but for the last
_SYMBOLS = ("square", "triangle-up", "diamond", "cross", "triangle-down", "pentagon")
_FAILURES = ("x-thin", "cross-thin", "asterisk", "square", "diamond", "hexagon", "triangle-up", "star")
_OWNERS = dict.fromkeys(("process", "cuda_context"), "#7b8794")
_OWNERS |= {"weights": "#1f4e79", "lm_head": "#3d85b8", "embeddings": "#9ccbe8", "draft": "#a8527f"}
_OWNERS |= {"kv_cache": "#e69f00", "draft_kv_cache": "#f7dc9a", "activations": "#009e73", "slack": "#d5dae0"}


@dataclass(frozen=True)
class RunData:
    """A run as it is stored: every record, the policy (None before there is one) and run.json's content."""

    records: Sequence[Record]
    workload: Workload
    budget: Budget
    policy: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


def write_report(run: RunData, path: Path) -> None:
    """Write the page for `run` to `path`; it needs no network and no other file."""
    from plotly.offline import get_plotlyjs

    view = _View(run)
    parts = {
        "title": _join([f"autotune: {view.model}"]),
        "plotly": _Html(f"<script>{get_plotlyjs()}</script>"),
        "facts": _facts(view),
        "headline": _join([_headline(view)]),
        "answers": _answer_table(view),
        "pareto": _pareto_section(view),
        "contexts": _context_figure(view),
        "memory": _memory_figure(view),
        "outcomes": _outcome_tables(view),
        "measurements": _measurement_table(view),
        "inputs": _input_table(view),
    }
    template = Template(resources.files("autotune").joinpath("report_template.html").read_text("utf-8"))
    path.write_text(template.substitute(parts), "utf-8")


def describe(configuration: Configuration, versus: Configuration | None = None) -> str:
    """The knobs in which `configuration` differs from `versus`, as `knob=value, knob=value`; "same" when in none.

    Without `versus` the weights are always named, and the other knobs when they are not the stock setting.
    """
    against = versus or Configuration(weights="")
    differing = [name for name in _KNOBS if getattr(configuration, name) != getattr(against, name)]
    return ", ".join(_settings(configuration, differing)) or "same"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (rate, loss) points that none beats (as fast, as good, and better in one), the slowest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front[::-1]


# What the run says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What the policy chose for one context, beside the baseline there."""

    context: int
    rule: Mapping[str, Any]
    chosen: Record | None
    baseline: Record | None
    speedup: float | None  # None where either has no figure, or the baseline does not fit
    tie: bool

    @property
    def kept(self) -> bool:
        return bool(self.chosen and self.baseline and self.chosen.configuration == self.baseline.configuration)

    @property
    def gains(self) -> bool:
        return not self.kept and not self.tie and (self.speedup or 0) > 1

    @property
    def verdict(self) -> str:
        if self.chosen is None:
            return "nothing chosen"
        if self.kept:
            return "baseline kept"
        if self.speedup is not None:
            return f"tie ({self.speedup:.2f}x)" if self.tie else f"{self.speedup:.2f}x"
        return f"baseline {_words(self.baseline.outcome)}" if self.baseline else "no baseline"


class _View:
    """A run with what every section asks of it: one record per configuration and context, the baseline, the answers."""

    def __init__(self, run: RunData) -> None:
        self.run, self.policy, self.budget = run, run.policy or {}, run.budget.bytes / MIB
        self.unit, self._figure, self._interval = _RATES[run.workload.objective]
        model = self.policy.get("model") or run.info.get("model") or "model"
        self.model = _short_path(str(model["path"] if isinstance(model, Mapping) else model))
        care = {"search": 0, "baseline": 1, "final": 2}  # of several, the last of the most careful stage counts
        ordered = sorted(run.records, key=lambda record: care.get(record.stage, 0))
        self.measured = {(record.configuration, record.context_tokens): record for record in ordered}
        stock = self.policy.get("baseline") or ()
        self._settle(stock)
        self.records = list(self.measured.values())
        asked = any(record.task_f1 is not None for record in self.records)
        self.figures = _FIGURES + (_TASK_FIGURES if asked else ())
        self.baselines = {entry["context_tokens"]: _configuration(entry["load"], entry["settings"]) for entry in stock}
        self.baseline = self._find_baseline()
        self.contexts = sorted({*run.workload.contexts, *(record.context_tokens for record in self.records)})
        ends = {*run.workload.contexts, *(rule["max_context_tokens"] for rule in self.policy.get("rules") or [])}
        looked = {record.context_tokens for record in self.records if record.stage == "boundary"} - ends
        self.answers = [self._answer(context) for context in self.contexts if context not in looked]

    def rate(self, record: Record) -> float | None:
        return record.rate(self.run.workload.objective) if getattr(record, self._figure) else None

    def speed(self, record: Record) -> float:
        return self.rate(record) or 0.0

    def interval(self, record: Record) -> tuple[float, float] | None:
        interval: tuple[float, float] | None = getattr(record, self._interval)
        return (1 / interval[1], 1 / interval[0]) if interval and self._figure == "ttft_s" else interval

    def loss(self, record: Record, unit: str = "", error: bool = True) -> str:
        """Quality loss in %, or that the reference differs as much from itself."""
        floor = (self.run.info.get("reference") or {}).get("noise_floor", {})
        if record.perplexity_ratio is not None and within_noise(record.perplexity_ratio, floor):
            return "within noise"
        return _number(_loss(record), unit, error=_loss_error(record) if error else None)

    def name(self, configuration: Configuration) -> str:
        return "baseline" if configuration == self.baseline else describe(configuration, self.baseline)

    def _settle(self, stock: Iterable[Mapping[str, Any]]) -> None:
        """What was measured several times has the figures that the policy made of them."""
        load = self.policy.get("load") or {}
        rules = [
            (rule.get("load") or load, rule["max_context_tokens"], rule) for rule in self.policy.get("rules") or []
        ]
        for group, context, entry in [*rules, *((entry["load"], entry["context_tokens"], entry) for entry in stock)]:
            key = _configuration(group, entry["settings"]), context
            expected = entry.get("expected") or {}
            names = ("tokens_per_s", "tokens_per_s_interval", "decode_tokens_per_s", "ttft_s", "peak_bytes")
            if key in self.measured:
                figures = {name: expected[name] for name in names if expected.get(name) is not None}
                self.measured[key] = replace(self.measured[key], **figures)

    def _find_baseline(self) -> Configuration | None:
        if self.baselines:
            return self.baselines[min(self.baselines)]
        measured = [record for record in self.run.records if record.stage == "baseline"]
        return min(measured, key=lambda record: record.outcome != "ok").configuration if measured else None

    def _answer(self, context: int) -> _Answer:
        ends = [(rule.get("max_context_tokens") or math.inf, rule) for rule in self.policy.get("rules") or []]
        covering = [end for end in ends if context <= end[0]]
        rule = min(covering, key=lambda end: end[0])[1] if covering else None
        chosen = self._chosen(rule, context) if rule is not None else None
        stock = self.baselines.get(context, self.baseline)
        baseline = self.measured.get((stock, context)) if stock else None
        if not chosen or not baseline or baseline.outcome != "ok" or not self.speed(baseline) or not self.rate(chosen):
            return _Answer(context, rule or {}, chosen, baseline, None, False)
        ours, theirs = self.interval(chosen), self.interval(baseline)
        overlap = bool(ours and theirs and ours[0] <= theirs[1] and theirs[0] <= ours[1])
        tie = bool((rule or {}).get("tie", overlap))
        gain = (rule or {}).get("speedup") or self.speed(chosen) / self.speed(baseline)
        return _Answer(context, rule or {}, chosen, baseline, gain, tie)

    def _chosen(self, rule: Mapping[str, Any], context: int) -> Record:
        """The stored record of a rule's configuration, or what the policy expects where the storage has none."""
        configuration = _configuration(rule.get("load") or self.policy.get("load") or {}, rule["settings"])
        known = {"configuration": asdict(configuration), "context_tokens": context, "outcome": "ok"}
        expected = Record.from_json({**(rule.get("expected") or {}), **known})
        return self.measured.get((configuration, context), expected)


def _configuration(load: Mapping[str, Any], settings: Mapping[str, Any]) -> Configuration:
    """A policy's load group and settings together: there, `model` stands for the load group's draft."""
    knobs = _knobs(load, settings)
    if settings.get("draft") in ("model", "none") and load.get("draft", "none") != "none":
        knobs |= {"draft": load["draft"], "depth": knobs.get("depth", 0) if settings["draft"] == "model" else 0}
    return Configuration(**knobs)


def _knobs(*sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """The knobs that the sources name, the later ones counting."""
    return {key: value for source in sources for key, value in (source or {}).items() if key in _KNOBS}


def _loss(record: Record) -> float | None:
    """Quality loss in %: how much the perplexity grew over the reference's."""
    return None if record.perplexity_ratio is None else 100 * (record.perplexity_ratio - 1)


def _loss_error(record: Record) -> float | None:
    interval, ratio = record.perplexity_ratio_interval, record.perplexity_ratio
    return None if interval is None or ratio is None else 100 * max(interval[1] - ratio, ratio - interval[0])


# Text -----------------------------------------------------------------------------------------------------------------


class _Html(str):
    """Markup of ours; any other text is escaped where it meets markup."""


def _join(parts: Iterable[object]) -> _Html:
    return _Html("".join(part if isinstance(part, _Html) else html.escape(str(part)) for part in parts))


def _tag(name: str, *content: object, **attributes: str) -> _Html:
    opening = "".join(f' {key.strip("_").replace("_", "-")}="{html.escape(text)}"' for key, text in attributes.items())
    return _Html(f"<{name}{opening}>{_join(content)}</{name}>")


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], class_: str = "scroll") -> _Html:
    """A table; heads that begin with `#` stand over numbers, with `~` over long text."""
    kinds = [{"#": "number", "~": "wide"}.get(head[0], "text") for head in heads]
    top = [_tag("th", head.lstrip("#~"), class_=kind) for head, kind in zip(heads, kinds, strict=True)]
    body = [_tag("tr", *map(_cell, row, kinds)) for row in rows]
    return _tag("div", _tag("table", _tag("thead", _tag("tr", *top)), _tag("tbody", *body)), class_=class_)


def _cell(value: object, kind: str) -> _Html:
    """A cell; a pair is a text with the number that it is sorted by."""
    if not isinstance(value, tuple):
        return _tag("td", value, class_=kind)
    return _tag("td", value[0], class_=kind, data_value=str(math.nan if value[1] is None else value[1]))


def _fold(summary: str, content: object) -> _Html:
    return _tag("details", _tag("summary", summary), content)


def _number(value: float | None, unit: str = "", scale: float = 1, error: float | None = None) -> str:
    """Three digits or so, `12.3 ± 0.4 unit`; a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    value, error = value * scale, None if error is None else error * scale
    size = max(abs(value), abs(error or 0))
    decade = math.floor(math.log10(size)) if size else 0
    digits = max(2 - decade, 0) if decade >= 0 else max(1 - decade, 2)
    return f"{value:,.{digits}f}{'' if error is None else f' ± {error:,.{digits}f}'} {unit}".strip()


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _outcome(outcome: str) -> _Html:
    return _tag("span", _words(outcome), class_="tag good" if outcome == "ok" else "tag bad")


def _short_path(name: str) -> str:
    """The last part of a path; an ID such as `owner/name` is left as it is."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if re.match(r"[/\\.~]|\w:", name) else name


def _settings(configuration: Configuration, knobs: Iterable[str] = _KNOBS) -> list[str]:
    """`knob=value` for those of the knobs that say anything about this configuration."""
    idle = {"depth": configuration.draft == "none", "draft_weights": not configuration.has_draft_model}
    values = asdict(configuration) | {"draft": re.split(r"[/\\]", configuration.draft.rstrip("/\\"))[-1]}
    values["prefill_chunk"] = configuration.prefill_chunk or "whole"
    return [f"{knob}={values[knob]}" for knob in knobs if not idle.get(knob)]


# The answer -----------------------------------------------------------------------------------------------------------


def _facts(view: _View) -> _Html:
    hardware = view.run.info.get("hardware")
    if isinstance(hardware, Mapping):
        hardware = next((hardware[key] for key in ("name", "gpu", "device", "cpu") if hardware.get(key)), None)
    facts = [f"budget {mib(view.run.budget.bytes)}", view.run.budget.device, hardware, view.run.info.get("started")]
    return _join([" · ".join(str(fact) for fact in facts if fact)])


def _headline(view: _View) -> str:
    chosen = [answer for answer in view.answers if answer.chosen]
    answer = next((answer for answer in reversed(chosen) if answer.speedup), chosen[-1] if chosen else None)
    if answer is None or answer.chosen is None:
        fitting = sum(record.outcome == "ok" for record in view.records)
        nothing = f"Nothing that was measured fits {mib(view.run.budget.bytes)} and keeps its quality."
        return f"Nothing is chosen; {fitting} of {len(view.records)} measurements fit." if fitting else nothing
    record = answer.chosen
    said = [f"At {answer.context:,} tokens: {_comparison(answer)}", f"{_number(view.rate(record))} {view.unit}"]
    said += [] if record.peak_bytes is None else [f"{record.peak_bytes / MIB:,.0f} of {view.budget:,.0f} MiB"]
    said += [] if record.perplexity_ratio is None else [f"quality loss {view.loss(record, '%')}"]
    gains = [a.speedup for a in chosen if a.speedup]
    over = f" Over all contexts: {min(gains):.1f}x to {max(gains):.1f}x." if len(gains) > 1 and max(gains) > 1 else ""
    alone = [f"{a.context:,}" for a in chosen if a.baseline and a.baseline.outcome != "ok" and a is not answer]
    return ", ".join(said) + "." + over + (f" The baseline does not run at {', '.join(alone)}." if alone else "")


def _comparison(answer: _Answer) -> str:
    if answer.kept:
        return "the baseline is kept, for nothing that fits is measurably faster"
    if answer.speedup is None:
        outcome = answer.baseline.outcome if answer.baseline else "ok"
        return "no baseline to compare with" if outcome == "ok" else f"the baseline does not run ({_words(outcome)})"
    return f"a tie with the baseline ({answer.speedup:.2f}x)" if answer.tie else f"{answer.speedup:.1f}x the baseline"


def _answer_table(view: _View) -> _Html:
    chosen = [answer.chosen.configuration for answer in view.answers if answer.chosen]
    shared = [k for k in _LOAD_KNOBS if len({getattr(c, k) for c in chosen}) == 1]
    heads = ["#context", "~settings", f"#{view.unit}", "#against baseline", "#first token", "#footprint"]
    table = _table([*heads, "#quality loss", "#acceptance"], [_answer_row(view, a, shared) for a in view.answers])
    codes = _codes(_settings(chosen[0], shared)) if shared else ""
    return _join([_tag("p", "For every context: ", codes) if shared else "", table])


def _answer_row(view: _View, answer: _Answer, shared: Sequence[str]) -> list[object]:
    context, record, note = _tag("strong", f"{answer.context:,}"), answer.chosen, answer.rule.get("note")
    verdict = _tag("span", answer.verdict, class_="tag good" if answer.gains else "tag")
    base = answer.baseline and view.rate(answer.baseline)
    against = _join([verdict, _tag("small", f"baseline {_number(base)}") if base else ""])
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
    settings = _codes(_settings(record.configuration, [knob for knob in _KNOBS if knob not in shared]))
    interval = view.interval(record)
    spread = f"{_number(interval[0])} to {_number(interval[1])}" if interval else ""
    return [
        context,
        _join([settings, _tag("small", note) if note else ""]),
        _join([_number(view.rate(record)), _tag("small", spread)]),
        against,
        _number(record.ttft_s, "ms", 1000),
        _meter(view, record),
        view.loss(record, "%"),
        _number(record.acceptance, "%", 100),
    ]


def _codes(texts: Iterable[str]) -> _Html:
    return _join(_join([_tag("code", text), " "]) for text in texts)


def _meter(view: _View, record: Record) -> _Html:
    share = (record.peak_bytes or 0) / view.run.budget.bytes
    bar = _tag("div", _tag("i", style=f"width:{min(share, 1):.1%}"), class_="meter over" if share > 1 else "meter")
    label = f"{100 * share:.0f} %"
    return _join(
        [_number(record.peak_bytes, "MiB", 1 / MIB), *([_tag("small", label), bar] if record.peak_bytes else [])]
    )


# Pictures -------------------------------------------------------------------------------------------------------------


def _figure(figure: Any, height: int, name: str, bottom: int) -> _Html:
    """The picture as markup; `bottom` pixels hold the axis title and the legend."""
    font = {"family": "system-ui, -apple-system, Segoe UI, Liberation Sans, Arial, sans-serif", "color": _INK}
    legend = {"orientation": "h", "y": -54 / (height - bottom - 60), "yanchor": "top", "x": 0, "traceorder": "normal"}
    figure.update_layout(template="plotly_white", height=height, font=font, legend=legend)
    figure.update_layout(
        hoverlabel={"align": "left", "bgcolor": "white"}, margin={"l": 60, "r": 10, "t": 60, "b": bottom}
    )
    figure.update_xaxes(gridcolor=_GRID, linecolor=_FAINT, ticks="outside", tickcolor=_FAINT, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, linecolor=_FAINT, zeroline=False)
    config = {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": "hover",
        "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    }
    return _tag(
        "div",
        _Html(figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name)),
        class_="figure",
    )


def _hover(view: _View, record: Record) -> str:
    ratio = "" if record.perplexity_ratio is None else f", perplexity ratio {record.perplexity_ratio:.4f}"
    figures = [f"{name} {_number(getattr(record, key), unit, scale)}" for name, key, unit, scale in view.figures]
    lines = [
        f"{_words(record.outcome)}, {_number(view.rate(record))} {view.unit}, {record.context_tokens:,} tokens",
        f"quality loss {view.loss(record, '%')}{ratio}",
        ", ".join(figures[:3]),
        ", ".join(figures[3:]),
        *textwrap.wrap(" ".join(_settings(record.configuration)), 76),
        *textwrap.wrap(textwrap.shorten(record.reason, 300), 76),
    ]
    return "<br>".join(html.escape(line) for line in lines)


def _pareto_section(view: _View) -> _Html:
    parts = []
    for answer in view.answers:
        here = [record for record in view.records if record.context_tokens == answer.context]
        drawn = [record for record in here if view.rate(record)]
        blank = Counter(_words(record.outcome) for record in here if not view.rate(record)).most_common()
        parts.append(_tag("h3", f"{answer.context:,} tokens of context"))
        notes = (
            [f"Without figures: {', '.join(f'{n} {outcome}' for outcome, n in blank)} (see Outcomes)."] if blank else []
        )
        if drawn:
            picture = _Pareto(view, answer, drawn)
            parts.append(_figure(picture.figure(), 430, f"pareto-{answer.context}", 100))
            notes = [*picture.notes(), *notes]
        parts.append(_tag("p", " ".join(notes or [] if here else ["Nothing was measured."]), class_="note"))
    return _join(parts)


class _Pareto:
    """The picture of one context; what lies off the scale is drawn at its edge, what has no quality, in a strip."""

    def __init__(self, view: _View, answer: _Answer, drawn: Sequence[Record]) -> None:
        self.view, self.answer, self.drawn = view, answer, drawn
        self.limit = 100 * view.run.workload.max_quality_loss
        losses = [loss for record in drawn if record.outcome == "ok" and (loss := _loss(record)) is not None]
        self.low, top = min([0.0, *losses]), max([0.0, *losses])
        self.top = max(top, self.limit) if top - self.low > self.limit / 8 or not losses else top
        span = max(self.top - self.low, 0.05)
        self.high, self.bottom = self.low + 1.12 * span, self.low - 0.1 * span
        self.strip = self.bottom - 0.06 * span
        self.blank = any(_loss(record) is None for record in drawn)
        rates = [view.speed(record) for record in drawn]
        margin = 0.06 * max(max(rates) - min(rates), 0.1 * max(rates))
        self.left, self.right = min(rates) - margin, max(rates) + margin

    def figure(self) -> Any:
        from plotly import graph_objects as go

        figure = go.Figure()
        ok = [record for record in self.drawn if record.outcome == "ok"]
        scored = [record for record in ok if _loss(record) is not None]
        front = [scored[i] for i in pareto_front([(self.view.speed(r), self.y(r)) for r in scored])]
        line = {"color": "#52606d", "width": 1.5, "shape": "vh"}
        figure.add_scatter(
            **{**self.points(front), "mode": "lines", "hoverinfo": "skip"}, line=line, name="Pareto front"
        )
        figure.add_scatter(**self.points(ok), **self.intervals(ok), marker=self.colors(ok), name="fits")
        for outcome, symbol in zip(OUTCOMES[1:], _FAILURES, strict=True):
            failed = [record for record in self.drawn if record.outcome == outcome]
            marker = {"symbol": f"{symbol}-open", "size": 9, "color": _FAILED, "line": {"width": 1.6, "color": _FAILED}}
            if failed:
                figure.add_scatter(**self.points(failed), marker=marker, name=_words(outcome))
        self.add_limits(figure)
        self.add_names(figure)
        figure.update_xaxes(title=f"{self.view.unit} (more is faster)", range=[self.left, self.right])
        return figure

    def y(self, record: Record) -> float:
        loss = _loss(record)
        return (self.bottom + self.strip) / 2 if loss is None else min(loss, self.high)

    def points(self, records: Sequence[Record]) -> dict[str, Any]:
        place = {"x": [self.view.speed(record) for record in records], "y": [self.y(record) for record in records]}
        hover = [_hover(self.view, record) for record in records]
        return {**place, "mode": "markers", "hovertext": hover, "hoverinfo": "text", "cliponaxis": False}

    def colors(self, records: Sequence[Record]) -> dict[str, Any]:
        peaks = [record.peak_bytes / MIB if record.peak_bytes else math.nan for record in records]
        low, high = min([0.9 * self.view.budget, *(peak for peak in peaks if peak > 0)]), self.view.budget
        ticks = [low + (high - low) * step / 4 for step in range(5)]
        names = [f"{tick:,.0f}" for tick in ticks[:-1]] + [f"{high:,.0f} budget"]
        bar = {
            "title": {"text": "footprint, MiB", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": ticks,
        }
        scale = {"cmin": low, "cmax": high, "colorscale": _FOOTPRINT, "colorbar": {**bar, "ticktext": names}}
        return {"color": peaks, **scale, "size": 11, "opacity": 0.9, "line": {"color": "white", "width": 1}}

    def intervals(self, records: Sequence[Record]) -> dict[str, Any]:
        speeds = [self.view.speed(record) for record in records]
        ends = [self.view.interval(record) or (speed, speed) for record, speed in zip(records, speeds, strict=True)]
        faint = {"type": "data", "thickness": 1, "width": 0, "color": "rgba(82,96,109,0.35)"}
        above = [end[1] - speed for end, speed in zip(ends, speeds, strict=True)]
        below = [speed - end[0] for end, speed in zip(ends, speeds, strict=True)]
        losses = [_loss_error(record) or 0 for record in records]
        return {"error_x": {**faint, "array": above, "arrayminus": below}, "error_y": {**faint, "array": losses}}

    def add_limits(self, figure: Any) -> None:
        if self.limit <= self.high:
            line = {"color": _CHOSEN, "dash": "dash", "width": 1.2}
            ends = {"x": [self.left, self.right], "y": [self.limit] * 2}
            figure.add_scatter(**ends, mode="lines", line=line, name=f"limit, {self.limit:g} %", hoverinfo="skip")
        rough = (self.high - self.bottom) / 8
        step = 10 ** math.floor(math.log10(rough))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
        ticks = [round(step * i, 6) for i in range(math.ceil(self.bottom / step), math.floor(self.high / step) + 1)]
        names = [f"{tick:g}" for tick in ticks]
        if self.blank:
            figure.add_hrect(self.strip, self.bottom, fillcolor=_GRID, opacity=0.5, line_width=0, layer="below")
            ticks, names = [(self.strip + self.bottom) / 2, *ticks], ["not<br>measured", *names]
        title, low = "quality loss, % (less is better)", self.strip if self.blank else self.bottom
        figure.update_yaxes(title=title, range=[low, self.high], tickvals=ticks, ticktext=names)

    def add_names(self, figure: Any) -> None:
        """Labels stand in rows above the picture, where they cover neither a point nor each other."""
        answer = self.answer
        names = [("chosen", answer.chosen, _CHOSEN), ("baseline", answer.baseline, _INK)]
        names = [("chosen: the baseline", answer.chosen, _CHOSEN)] if answer.kept else names
        present = [(name, record, color) for name, record, color in names if record and record in self.drawn]
        for row, (name, record, color) in reversed(list(enumerate(present))):
            x, y = self.view.speed(record), self.y(record)
            side = (x - self.left) / (self.right - self.left)
            anchor = "left" if side < 0.35 else "right" if side > 0.65 else "center"
            loss = "" if _loss(record) is None else f", loss {self.view.loss(record, '%', error=False)}"
            text = f"<b>{name}</b> {_number(x)} {self.view.unit}{loss}"
            tail = {
                "ax": x,
                "axref": "x",
                "ay": self.high + (0.05 + 0.08 * row) * (self.high - self.bottom),
                "ayref": "y",
            }
            look = {"arrowcolor": color, "arrowwidth": 1, "arrowhead": 0, "standoff": 10, "bgcolor": "white"}
            figure.add_annotation(x=x, y=y, text=text, **tail, **look, xanchor=anchor, font={"color": color})
            ring = {"symbol": "circle-open", "size": 19, "color": color, "line": {"width": 2.5, "color": color}}
            marks = {**self.points([record]), "marker": ring, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(**marks)

    def notes(self) -> list[str]:
        off = sum((_loss(record) or 0) > self.high for record in self.drawn)
        notes = [f"The limit of {self.limit:g} % lies above the scale."] if self.limit > self.high else []
        return [*notes, f"{off} with a loss beyond the scale stand at its upper edge."] if off else notes


def _context_figure(view: _View) -> _Html:
    """Rate and footprint over context, side by side: chosen, baseline, and each load group's fastest that fits."""
    from plotly.subplots import make_subplots

    lines = _context_lines(view)
    if not lines:
        return _tag("p", "Nothing that was measured fits.", class_="note")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.15)
    for name, records, style in lines:
        xs, text = [f"{record.context_tokens:,}" for record in records], html.escape(name)
        hover = [f"<b>{text}</b><br>{_hover(view, record)}" for record in records]
        look = {**style, "x": xs, "mode": "lines+markers", "name": text, "legendgroup": text, "hoverinfo": "text"}
        peaks = [record.peak_bytes / MIB if record.peak_bytes else None for record in records]
        figure.add_scatter(**look, y=[view.rate(record) for record in records], hovertext=hover, row=1, col=1)
        figure.add_scatter(**look, y=peaks, hovertext=hover, showlegend=False, row=1, col=2)
    contexts = [f"{context:,}" for context in view.contexts]
    line = {"color": _CHOSEN, "dash": "dash", "width": 1.2}
    name = f"budget, {view.budget:,.0f} MiB"
    figure.add_scatter(x=contexts, y=[view.budget] * len(contexts), mode="lines", line=line, name=name, row=1, col=2)
    figure.update_xaxes(title="context, tokens", type="category", categoryorder="array", categoryarray=contexts)
    figure.update_yaxes(rangemode="tozero", tickformat=",")
    figure.update_yaxes(title=view.unit, row=1, col=1)
    figure.update_yaxes(title="footprint, MiB", row=1, col=2)
    bottom = 64 + 20 * len(lines)
    return _figure(figure, 380 + bottom, "contexts", bottom)


def _context_lines(view: _View) -> list[tuple[str, list[Record], dict[str, Any]]]:
    """Name, records by context, and style of each line; of the load groups, the six fastest."""
    groups: dict[LoadGroup, dict[int, Record]] = defaultdict(dict)
    for record in sorted(view.records, key=view.speed):
        if record.outcome == "ok":
            groups[record.configuration.load_group][record.context_tokens] = record
    fastest = sorted(groups, key=lambda group: -max(map(view.speed, groups[group].values())))
    base = view.baseline.load_group if view.baseline else LoadGroup()
    lines: list[tuple[str, list[Record], dict[str, Any]]] = []
    for group, color, symbol in zip(fastest, _LINES, _SYMBOLS, strict=False):
        style = {"line": {"color": color, "width": 1.5}, "marker": {"symbol": symbol, "size": 8, "color": color}}
        loaded = describe(Configuration(**asdict(group)), Configuration(**asdict(base)))
        name = "fastest, loaded as the baseline" if group == base else f"fastest with {loaded}"
        lines.append((name, [groups[group][context] for context in sorted(groups[group])], style))
    base_line = [answer.baseline for answer in view.answers if answer.baseline]
    chosen_line = [answer.chosen for answer in view.answers if answer.chosen]
    lines = [line for line in lines if any(record not in [*base_line, *chosen_line] for record in line[1])]
    dashed = {"line": {"color": _INK, "width": 2, "dash": "dot"}, "marker": {"symbol": "circle-open", "size": 10}}
    thick = {"line": {"color": _CHOSEN, "width": 3.5}, "marker": {"symbol": "circle", "size": 10}}
    return [line for line in [*lines, ("baseline", base_line, dashed), ("chosen", chosen_line, thick)] if line[1]]


def _memory_figure(view: _View) -> _Html:
    """The footprint by owner, a bar each for the baseline and the chosen at every context."""
    from plotly import graph_objects as go

    named = [(a, name, r) for a in view.answers for name, r in (("baseline", a.baseline), ("chosen", a.chosen))]
    bars = {
        f"{a.context:,} {name}": r.memory
        for a, name, r in named
        if r and r.memory and not (a.kept and name == "chosen")
    }
    if not bars:
        return _tag("p", "No record says which owner holds how much.", class_="note")
    figure, sums = go.Figure(), {name: sum(memory.values()) / MIB for name, memory in bars.items()}
    for owner in dict.fromkeys([*_OWNERS, *(owner for memory in bars.values() for owner in memory)]):
        sizes, name = [memory.get(owner, 0) / MIB for memory in bars.values()], html.escape(_words(owner))
        hover = [f"{name}: {_number(size, 'MiB')}" for size in sizes]
        marker = {"color": _OWNERS.get(owner, "#b0a18f"), "line": {"color": "white", "width": 1}}
        look = {"orientation": "h", "marker": marker, "hovertext": hover, "hoverinfo": "text"}
        if any(sizes):
            figure.add_bar(x=sizes, y=list(bars), name=name, **look)
    for name, total in sums.items():
        label = {"text": f"{total:,.0f} MiB", "xanchor": "left", "xshift": 4, "bgcolor": "white", "showarrow": False}
        figure.add_annotation(x=total, y=name, **label)
    text = {"text": f"budget {view.budget:,.0f} MiB", "yref": "paper", "yanchor": "bottom", "showarrow": False}
    figure.add_vline(view.budget, line={"color": _CHOSEN, "dash": "dash", "width": 1.5})
    figure.add_annotation(x=view.budget, y=1, **text)
    figure.update_xaxes(title="MiB", tickformat=",", range=[0, 1.15 * max(view.budget, *sums.values())])
    figure.update_yaxes(autorange="reversed", type="category", ticksuffix="  ", automargin=True)
    figure.update_layout(barmode="stack", bargap=0.3)
    return _figure(figure, 170 + 36 * len(bars), "memory", 110)


# Tables ---------------------------------------------------------------------------------------------------------------


def _outcome_tables(view: _View) -> _Html:
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
    note = _tag("p", "Reasons that differ in numbers only are counted together.", class_="note")
    table = _table(["outcome", "~the first one's reason", "#count", "~where"], failed)
    return _join([_table(heads, rows), *([_tag("h3", "What did not pass, by reason"), note, table] if failed else [])])


def _failure(view: _View, records: Sequence[Record]) -> list[object]:
    """Reason, count and configurations of failures for the same reason; their own reasons where these differ."""
    differ, reason = len({record.reason for record in records}) > 1, records[0].reason or "no reason stored"
    where: dict[Configuration, list[Record]] = defaultdict(list)
    for record in records:
        where[record.configuration].append(record)
    items = [
        _join([_tag("code", view.name(configuration)), " at ", "; ".join(_place(record, differ) for record in found)])
        for configuration, found in where.items()
    ]
    listed = items[0] if len(items) == 1 else _tag("ul", *(_tag("li", item) for item in items))
    text = _tag("code", reason)
    text = _fold(textwrap.shorten(reason, 120), text) if len(reason) > 160 else text
    return [text, len(records), _fold(f"{len(items)} configurations", listed) if len(items) > 3 else listed]


def _place(record: Record, with_reason: bool) -> str:
    return f"{record.context_tokens:,}" + (f" ({textwrap.shorten(record.reason, 100)})" if with_reason else "")


def _measurement_table(view: _View) -> _Html:
    ordered = sorted(view.run.records, key=lambda record: (record.context_tokens, -view.speed(record)))
    heads = ["#context", "outcome", "~settings, against the baseline", f"#{view.unit}", "#quality loss, %"]
    heads += [f"#{name}{unit and f', {unit}'}" for name, _, unit, _ in view.figures]
    table = _table([*heads, "#took, s", "stage"], [_measurement(view, record) for record in ordered], "scroll all")
    return _fold(
        f"{len(ordered)} measurements",
        _join([_tag("input", type="search", placeholder="filter, e.g. nf4 static"), table]),
    )


def _measurement(view: _View, record: Record) -> list[object]:
    rate, loss = view.rate(record), _loss(record)
    figures = [(getattr(record, key), scale) for _, key, _, scale in view.figures]
    return [
        (f"{record.context_tokens:,}", record.context_tokens),
        _outcome(record.outcome),
        _tag("code", view.name(record.configuration)),
        (_number(rate), rate),
        (view.loss(record), loss),
        *((_number(value, scale=scale), value) for value, scale in figures),
        (_number(record.measure_s), record.measure_s),
        record.stage,
    ]


def _input_table(view: _View) -> _Html:
    inputs = {"workload": asdict(view.run.workload), "budget": asdict(view.run.budget), **view.run.info}
    return _table(["name", "~value"], [[_tag("code", name), value] for name, value in _flat(inputs)])


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
