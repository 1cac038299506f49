"""A run as the report sees it: one record per configuration and context, the baseline, the answers; and its text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..config import MIB, Budget, Configuration, LoadGroup, Objective, Record, Workload, within_noise
from ..policy.compare import as_done

KNOBS = tuple(f.name for f in fields(Configuration))
LOAD_KNOBS = tuple(f.name for f in fields(LoadGroup))
_RATES: dict[Objective, tuple[str, str, str]] = {  # unit, figure, interval
    "end-to-end": ("tokens/s", "tokens_per_s", "tokens_per_s_interval"),
    "decode": ("decode tokens/s", "decode_tokens_per_s", "decode_tokens_per_s_interval"),
    "ttft": ("first tokens/s", "ttft_s", "ttft_s_interval"),
}
FIGURES = (  # name, field of a record, unit, scale
    ("first token", "ttft_s", "ms", 1000),
    ("acceptance", "acceptance", "%", 100),
    ("mean depth", "mean_depth", "", 1),
    ("footprint", "peak_bytes", "MiB", 1 / MIB),
    ("KL divergence", "kl_divergence", "", 1),
    ("top-1 agreement", "top1_agreement", "%", 100),
)
_TASK_FIGURES = (("task exact match", "task_exact_match", "%", 100), ("task F1", "task_f1", "%", 100))


@dataclass(frozen=True)
class RunData:
    """A run as it is stored: every record, the policy (None before there is one) and run.json's content.

    `importances` are `study.importances`: the knobs' shares per context, nothing where too few trials finished.
    """

    records: Sequence[Record]
    workload: Workload
    budget: Budget
    policy: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    importances: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def describe(configuration: Configuration, versus: Configuration | None = None) -> str:
    """The knobs in which `configuration` differs from `versus`, as `knob=value, knob=value`; "same" when in none.

    Without `versus` the weights are always named, and the other knobs when they are not the stock setting.
    """
    against = versus or Configuration(weights="")
    differing = [name for name in KNOBS if getattr(configuration, name) != getattr(against, name)]
    return ", ".join(knob_texts(configuration, differing)) or "same"


# What the run says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
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
        return f"baseline {words(self.baseline.outcome)}" if self.baseline else "no baseline"


class View:
    """A run with what every section asks of it: one record per configuration and context, the baseline, the answers."""

    def __init__(self, run: RunData) -> None:
        run = replace(run, records=as_done(run.records))  # what does the same is told as one
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
        self.figures = FIGURES + (_TASK_FIGURES if asked else ())
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
        return number(quality_loss(record), unit, error=quality_loss_error(record) if error else None)

    def name(self, configuration: Configuration) -> str:
        return "baseline" if configuration == self.baseline else describe(configuration, self.baseline)

    def _settle(self, stock: Iterable[Mapping[str, Any]]) -> None:
        """What was measured several times has the figures that the policy made of them."""
        load = self.policy.get("load") or {}
        rules = [
            (rule.get("load") or load, rule["max_context_tokens"], rule) for rule in self.policy.get("rules") or []
        ]
        for group, context, entry in [*rules, *((entry["load"], entry["context_tokens"], entry) for entry in stock)]:
            key = _configuration(group, entry["settings"]).at(context), context
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

    def _answer(self, context: int) -> Answer:
        ends = [(rule.get("max_context_tokens") or math.inf, rule) for rule in self.policy.get("rules") or []]
        covering = [end for end in ends if context <= end[0]]
        rule = min(covering, key=lambda end: end[0])[1] if covering else None
        chosen = self._chosen(rule, context) if rule is not None else None
        stock = self.baselines.get(context, self.baseline)
        baseline = self.measured.get((stock, context)) if stock else None
        if not chosen or not baseline or baseline.outcome != "ok" or not self.speed(baseline) or not self.rate(chosen):
            return Answer(context, rule or {}, chosen, baseline, None, False)
        ours, theirs = self.interval(chosen), self.interval(baseline)
        overlap = bool(ours and theirs and ours[0] <= theirs[1] and theirs[0] <= ours[1])
        tie = bool((rule or {}).get("tie", overlap))
        gain = (rule or {}).get("speedup") or self.speed(chosen) / self.speed(baseline)
        return Answer(context, rule or {}, chosen, baseline, gain, tie)

    def _chosen(self, rule: Mapping[str, Any], context: int) -> Record:
        """The stored record of a rule's configuration, or what the policy expects where the storage has none."""
        configuration = _configuration(rule.get("load") or self.policy.get("load") or {}, rule["settings"])
        configuration = configuration.at(context)
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
    return {key: value for source in sources for key, value in (source or {}).items() if key in KNOBS}


def quality_loss(record: Record) -> float | None:
    """Quality loss in %: how much the perplexity grew over the reference's."""
    return None if record.perplexity_ratio is None else 100 * (record.perplexity_ratio - 1)


def quality_loss_error(record: Record) -> float | None:
    interval, ratio = record.perplexity_ratio_interval, record.perplexity_ratio
    return None if interval is None or ratio is None else 100 * max(interval[1] - ratio, ratio - interval[0])


# Text -----------------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup of ours; any other text is escaped where it meets markup."""


def join(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def tag(name: str, *content: object, **attributes: str) -> Html:
    opening = "".join(f' {key.strip("_").replace("_", "-")}="{html.escape(text)}"' for key, text in attributes.items())
    return Html(f"<{name}{opening}>{join(content)}</{name}>")


def number(value: float | None, unit: str = "", scale: float = 1, error: float | None = None) -> str:
    """Three digits or so, `12.3 ± 0.4 unit`; a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    value, error = value * scale, None if error is None else error * scale
    size = max(abs(value), abs(error or 0))
    decade = math.floor(math.log10(size)) if size else 0
    digits = max(2 - decade, 0) if decade >= 0 else max(1 - decade, 2)
    return f"{value:,.{digits}f}{'' if error is None else f' ± {error:,.{digits}f}'} {unit}".strip()


def words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _short_path(name: str) -> str:
    """The last part of a path; an ID such as `owner/name` is left as it is."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if re.match(r"[/\\.~]|\w:", name) else name


def knob_texts(configuration: Configuration, knobs: Iterable[str] = KNOBS) -> list[str]:
    """`knob=value` for those of the knobs that say anything about this configuration."""
    idle = {"depth": configuration.draft == "none", "draft_weights": not configuration.has_draft_model}
    idle["speculation"] = configuration.depth < 2
    values = asdict(configuration) | {"draft": re.split(r"[/\\]", configuration.draft.rstrip("/\\"))[-1]}
    values["prefill_chunk"] = configuration.prefill_chunk or "whole"
    return [f"{knob}={values[knob]}" for knob in knobs if not idle.get(knob)]


def codes(texts: Iterable[str]) -> Html:
    return join(join([tag("code", text), " "]) for text in texts)
