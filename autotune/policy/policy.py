"""The policy file: what to load, what to do at each prompt length, and the evidence.

`choice` says which configurations; here they become rules. A rule ends at a length at which its settings were measured:
at a context, or between two at a boundary that bisection found. It says what it gains over the baseline, and names what
ties with it, whatever that loads. A chunk that the prompts of a context fit is written as a whole prompt.
"""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config import (
    ATTENTIONS,
    CACHES,
    LM_HEADS,
    WEIGHTS,
    Budget,
    Configuration,
    Objective,
    Record,
    Workload,
    median_error,
    per_round,
)
from .choice import (
    as_done,
    broken,
    carried_out,
    compare,
    evidence_of,
    maximized,
    rivals,
    settle,
    sound,
    soundly_again,
    speedup,
    t95,
    tied,
    tied_loads,
    within,
)

SCHEMA_VERSION = 1
TASK_FIGURES = ("task_exact_match", "task_f1", "task_f1_interval", "task_loss")
SCHEMA_FILE = Path(__file__).parents[1] / "policy.schema.json"
_NAMED = 2  # ties that a rule's note has in words


class PolicyError(ValueError):
    """A policy file that cannot be read or used; the message names the file and the key."""


def _one_of(*words: str) -> Any:
    """A field that holds one of a knob's words: what this version does not know, it cannot run."""
    return Field(pattern=f"^({'|'.join(words)})$")


class _Model(BaseModel):
    """Unknown fields survive a round trip: a later version may have written them.

    One that resembles a known field which is missing beside it is taken for a misspelling and refused. A file that
    autotune wrote holds every field that its version knows, so none of its own is ever taken for one.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_misspelling(cls, data: Any) -> Any:
        if isinstance(data, dict):
            missing = set(cls.model_fields) - set(data)
            for key in sorted(set(data) - set(cls.model_fields)):
                if meant := difflib.get_close_matches(key, missing, 1, 0.8):
                    raise ValueError(f"unknown field '{key}': write '{meant[0]}'")
        return data


class ModelInfo(_Model):
    """A model that was measured: `files` are the sha256 of what it was loaded from, as `sha256sum` gives them.

    `revision` is `org/name@commit` for a folder of the Hugging Face cache. The two sums over several files are those of
    the lines that `sha256sum` prints for them. Where `files` is empty, an earlier version wrote the policy and the sums
    cover only the weights' headers, sizes and ends.
    """

    path: str
    revision: str | None = None
    weights_sha256: str
    tokenizer_sha256: str
    files: dict[str, str] = Field(default_factory=dict)


class Load(_Model):
    """The load group: what is loaded once, for all rules."""

    weights: str = _one_of(*WEIGHTS)
    lm_head: str = _one_of(*LM_HEADS)
    embeddings: Literal["device", "host"]
    draft: str
    draft_weights: str = _one_of("none", *WEIGHTS)
    attention: str = _one_of(*ATTENTIONS)


class Settings(_Model):
    """What changes per request. `draft` is none, prompt-lookup or model (the load group's).

    A policy without `speculation` was written before there was an adaptive depth: its depth is constant.
    """

    draft: Literal["none", "prompt-lookup", "model"]
    depth: int = Field(ge=0, le=16)
    speculation: Literal["constant", "adaptive"] = "constant"
    cache: str = _one_of(*CACHES)
    prefill_chunk: int = Field(ge=0)
    launch: Literal["eager", "graph", "compile"]


class Expected(_Model):
    """What was measured, with 95 % intervals: rates in tokens/s, the highest footprint that was witnessed in bytes.

    An interval is null where too little was measured for one.
    """

    tokens_per_s: float = Field(gt=0)
    tokens_per_s_interval: tuple[float, float] | None = None
    decode_tokens_per_s: float = Field(ge=0)
    ttft_s: float = Field(gt=0)
    peak_bytes: int = Field(gt=0)
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: tuple[float, float] | None = None
    acceptance: float | None = None
    task_exact_match: float | None = None
    task_f1: float | None = None
    task_f1_interval: tuple[float, float] | None = None
    task_loss: float | None = None  # points of F1 below the reference's own answers


class _Alternative(_Model):
    load: Load
    settings: Settings
    tokens_per_s: float = Field(gt=0)
    gain: float = Field(gt=0)
    gain_interval: tuple[float, float] | None = None
    stage: str


class Unrestricted(_Alternative):
    """The fastest at a context in the search, whatever it loads. It was not measured again, which flatters it.

    `gain` is how many times as fast as the rule's settings it was, with a 95 % interval where there is one.
    """


class Tie(_Alternative):
    """A configuration that was within error of the fastest with the rule's load here, as the rule's own settings were.

    What was measured again may be of another load, the baseline too. `gain` is how many times as fast as the rule's
    settings it was, with its 95 % interval. `stage` is `final` where it was measured again like them; else it is the
    search's, in which both were alike.
    """


class Evidence(_Model):
    """What `expected` rests on: so many measurements with prompts and new tokens of these lengths.

    `witness` is the instrument that saw the footprint; `stage` is `final` for finalists that were measured again.
    """

    stage: str = ""
    measurements: int = 0
    witness: str = ""
    context_tokens: int | None = None
    new_tokens: int | None = None


class Rule(_Model):
    """Prompts of up to `max_context_tokens` tokens (and longer than the rule before).

    Where rules need different loads, `load` is this rule's if it is not the policy's, and `reload_s` is what it takes.
    `tie` says that the baseline is within error of these settings, `ties` what is within error of the fastest.
    """

    max_context_tokens: int = Field(gt=0)
    settings: Settings
    expected: Expected
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    tie: bool = False
    note: str = ""
    evidence: Evidence = Field(default_factory=Evidence)
    load: Load | None = None
    reload_s: float | None = None
    unrestricted: Unrestricted | None = None
    ties: list[Tie] = Field(default_factory=list)


class Baseline(_Model):
    """What a user would run without tuning, measured at one context."""

    context_tokens: int
    load: Load
    settings: Settings
    expected: Expected


class Policy(_Model):
    """How to run one model within one budget on one machine."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    drafts: list[ModelInfo] = Field(default_factory=list)
    budget_bytes: int = Field(gt=0)
    environment: dict[str, Any]
    workload: dict[str, Any]
    load: Load
    rules: list[Rule] = Field(min_length=1)
    baseline: list[Baseline]

    @model_validator(mode="after")
    def _rules_ascend(self) -> Policy:
        limits = [rule.max_context_tokens for rule in self.rules]
        if limits != sorted(set(limits)):
            raise ValueError("rules must have ascending max_context_tokens")
        for rule in self.rules:
            if rule.settings.draft == "model" and (rule.load or self.load).draft == "none":
                raise ValueError("a rule uses a draft model, but load.draft is none")
            if any(tie.settings.draft == "model" and tie.load.draft == "none" for tie in rule.ties):
                raise ValueError("a rule's tie uses a draft model, but its load.draft is none")
        return self

    def rule_for(self, prompt_tokens: int) -> Rule:
        """The rule of a prompt's length. Raises PolicyError past the longest that was measured."""
        for rule in self.rules:
            if prompt_tokens <= rule.max_context_tokens:
                return rule
        longest = self.rules[-1].max_context_tokens
        raise PolicyError(f"the prompt has {prompt_tokens} tokens; the policy was measured up to {longest}")

    def configuration(self, rule: Rule) -> Configuration:
        """The rule as the configuration that was measured."""
        return to_configuration(rule.load or self.load, rule.settings)


def to_configuration(load: Load, settings: Settings) -> Configuration:
    """The knobs of a load group and a rule's settings together; a resident draft that is idle has depth 0."""
    draft: str = settings.draft
    depth = settings.depth
    if draft == "model" or (draft == "none" and load.draft != "none"):
        draft, depth = load.draft, depth if draft == "model" else 0
    return Configuration(
        weights=load.weights,
        lm_head=load.lm_head,
        embeddings=load.embeddings,
        draft=draft,
        draft_weights=load.draft_weights,
        depth=depth,
        speculation=settings.speculation,
        cache=settings.cache,
        attention=load.attention,
        prefill_chunk=settings.prefill_chunk,
        launch=settings.launch,
    )


def read_policy(path: Path) -> Policy:
    """Raises PolicyError for a file that is missing, not JSON or not a policy."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise PolicyError(f"{path} is not valid JSON: {error}") from None
    version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        mend = "a newer autotune wrote it: update this one" if newer else "run autotune again to make one"
        raise PolicyError(f"{path} has schema_version {version!r}; this autotune reads {SCHEMA_VERSION}: {mend}")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise PolicyError(f"{path}: {'.'.join(map(str, first['loc'])) or 'policy'}: {first['msg']}") from None


def write_policy(policy: Policy, path: Path) -> None:
    path.write_text(json.dumps(policy.model_dump(mode="json"), indent=2) + "\n")


def schema() -> dict[str, Any]:
    """The JSON Schema that autotune/policy.schema.json publishes."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


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


def load_of(configuration: Configuration) -> Load:
    return Load(**vars(configuration.load_group))


def settings_of(configuration: Configuration) -> Settings:
    draft = configuration.draft
    if configuration.has_draft_model:
        draft = "model" if configuration.depth else "none"
    return Settings(
        draft=draft,  # type: ignore[arg-type] # validated by pydantic
        depth=configuration.depth,
        speculation=configuration.speculation,  # type: ignore[arg-type]
        cache=configuration.cache,
        prefill_chunk=configuration.prefill_chunk,
        launch=configuration.launch,  # type: ignore[arg-type]
    )


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
