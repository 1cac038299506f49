"""The choice per context and the policy file: what to load, what to do at each prompt length, and the evidence.

One load group serves all contexts, unless reloads are asked for; `best_group` says what it maximizes. A recommendation
is significant or it is the baseline: finalists are measured again, interleaved with the baseline, and compared by
Welch's t on the logarithms of their rounds' rates. So is a contender, another load group that the search found near the
best; which of them is loaded is decided by the finals of all contexts together. Of what is within error of the fastest
the simplest stands (`Configuration.simplicity`), among load groups and then among what one can do at each context, and
the rule names the others as ties, whatever they load. What differs only in a chunk that the prompts of a context fit is
the same thing there and is written as a whole prompt (`Configuration.at`). A rule ends at a length at which its
settings were measured: at a context, or between two at a boundary that bisection found.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .config import (
    ATTENTIONS,
    CACHES,
    LM_HEADS,
    WEIGHTS,
    Budget,
    Configuration,
    LoadGroup,
    Objective,
    Record,
    Workload,
    median_error,
    per_round,
)

SCHEMA_VERSION = 1
TASK_FIGURES = ("task_exact_match", "task_f1", "task_f1_interval", "task_loss")
SCHEMA_FILE = Path(__file__).parent / "policy.schema.json"
TIE = 0.97  # a simpler configuration must reach this share of the best rate to be called a tie in the search
NEAR = 0.9  # and this in the finals, however wide the error, to be recommended in the place of the fastest
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


def best_group(records: Iterable[Record], workload: Workload) -> LoadGroup | None:
    """The load group that serves the workload fastest, of those that are ok at most of its contexts, and the longest.

    With a mix, which says how many of the requests have each length, that is the rate of all requests together: tokens
    over time, the harmonic mean of the contexts' rates weighted by the mix (the least mean seconds per request, as all
    generate equally many tokens). Without one nobody said how often each length comes. To suppose equally often would
    let the longest context decide alone, because its requests take most of the time; so there each context counts by
    how many times faster it gets, whatever its tokens/s: the geometric mean of the rates.
    """
    rates = _best_rates(records, workload)
    if not rates:
        return None
    return max(rates, key=lambda group: (len(rates[group]), max(rates[group]), _mean(rates[group], workload)))


def contender(
    records: Iterable[Record], workload: Workload, chosen: dict[int, Configuration]
) -> dict[int, Configuration]:
    """Another load group that the search found near the chosen one: its best configuration at each chosen context.

    One that is ok wherever the chosen load is, with a figure of at least `NEAR` of it (`best_group` says which). Of
    several the simplest if it is simpler than the chosen load, else the fastest. Empty where there is none, or where
    what is chosen has several loads.
    """
    records = list(records)
    ours = {configuration.load_group for configuration in chosen.values()}
    if len(ours) != 1:
        return {}
    (group,) = ours
    found: dict[LoadGroup, dict[int, Configuration]] = {}
    figures: dict[LoadGroup, float] = {}
    for other, rates in _best_rates(records, workload).items():
        if rates.keys() >= chosen.keys():
            figures[other] = _mean({context: rates[context] for context in chosen}, workload)
    for other in figures:
        if other != group and figures[other] >= NEAR * figures.get(group, math.inf):
            best = {context: best_in_group(records, other, context, workload.objective) for context in chosen}
            found[other] = {context: record.configuration for context, record in best.items() if record is not None}
    whole = [other for other in found if len(found[other]) == len(chosen)]
    if not whole:
        return {}
    simplest = min(whole, key=lambda other: other.simplicity)
    fastest = max(whole, key=lambda other: figures[other])
    return found[simplest if simplest.simplicity < group.simplicity else fastest]


def unfinished(records: Iterable[Record], workload: Workload, group: LoadGroup) -> LoadGroup | None:
    """The load group that would be the contender of this one if it were ok at every context, and lacks one of them."""
    rates = _best_rates(records, workload)
    figures = {}
    for other, theirs in rates.items():
        shared = [context for context in rates[group] if context in theirs]
        if other != group and 0 < len(shared) < len(rates[group]):
            sides = [_mean({context: side[context] for context in shared}, workload) for side in (theirs, rates[group])]
            figures[other] = sides[0] / sides[1]
    best = max(figures, key=lambda other: figures[other], default=None)
    return best if best is not None and figures[best] >= NEAR else None


def _best_rates(records: Iterable[Record], workload: Workload) -> dict[LoadGroup, dict[int, float]]:
    """The best rate of each load group at each context of the workload where it was ok."""
    rates: dict[LoadGroup, dict[int, float]] = {}
    for record in records:
        if record.outcome == "ok" and record.context_tokens in workload.contexts:
            at = rates.setdefault(record.configuration.load_group, {})
            rate = record.rate(workload.objective)
            at[record.context_tokens] = max(at.get(record.context_tokens, 0), rate)
    return rates


def _mean(rates: dict[int, float], workload: Workload) -> float:
    """What `best_group` maximizes, of a rate per context."""
    if not workload.mix:
        return statistics.geometric_mean(rates.values())
    share = dict(zip(workload.contexts, workload.mix, strict=True))
    return sum(share[c] for c in rates) / sum(share[c] / rate for c, rate in rates.items())


def maximized(workload: Workload) -> str:
    """`best_group`'s measure in words."""
    if workload.mix:
        return f"{workload.objective} rate of all requests together, mixed as given (weighted harmonic mean)"
    return f"geometric mean of the contexts' {workload.objective} rates"


def best_in_group(
    records: Iterable[Record], group: LoadGroup | None, context: int, objective: Objective
) -> Record | None:
    """The simplest of the records that are as fast as the group's fastest at this context, within error.

    Of all groups where `group` is None.
    """
    records = list(records)
    here = [r for r in _sound(records, context) if group in (None, r.configuration.load_group)]
    if not here:
        return None
    best = max(here, key=lambda record: record.rate(objective))
    ties = [
        record
        for record in here
        if record.rate(objective) >= TIE * best.rate(objective) and speedup([best], [record], objective)[1] <= 1
    ]
    return min([best, *ties], key=lambda record: (record.configuration.complexity, -record.rate(objective)))


def choose(records: list[Record], workload: Workload, reloads: bool = False) -> dict[int, Configuration]:
    """The configuration of each context: all of one load group; with reloads of another one where it is faster."""
    group, objective = best_group(records, workload), workload.objective
    chosen = {}
    for context in workload.contexts:
        best = best_in_group(records, group, context, objective) if group is not None else None
        alone = best_in_group(records, None, context, objective) if reloads else None
        if alone is not None and (best is None or speedup([alone], [best], objective)[1] > 1):
            best = alone
        if best is not None:
            chosen[context] = best.configuration
    return chosen


def as_done(records: Iterable[Record]) -> list[Record]:
    """The records with configurations as they were carried out: a prompt that fits its first chunk was read whole."""
    done = ((record, record.configuration.at(record.context_tokens)) for record in records)
    return [r if ours is r.configuration else dataclasses.replace(r, configuration=ours) for r, ours in done]


def rivals(records: Iterable[Record], leader: Configuration, context: int, objective: Objective) -> list[Configuration]:
    """What else of its load group may be as fast as the leader at this context, the fastest first.

    The leader and what is returned are as `as_done` has them.
    """
    here = [r for r in _sound(as_done(records), context) if r.configuration.load_group == leader.load_group]
    ours = [record for record in here if record.configuration == leader]
    fastest: dict[Configuration, Record] = {}
    for record in sorted(here, key=lambda r: (-r.rate(objective), r.configuration.simplicity)):
        if record.configuration != leader:
            fastest.setdefault(record.configuration, record)
    return [c for c, record in fastest.items() if ours and near([record], ours, objective)]


def near(ours: list[Record], theirs: list[Record], objective: Objective) -> bool:
    """Whether ours may be as fast as theirs: no slower than error explains, and by not much."""
    return _near(speedup(ours, theirs, objective))


def _near(compared: tuple[float, float, float]) -> bool:
    ratio, _, high = compared
    return ratio >= NEAR and high >= 1


def keeps_up(
    records: Iterable[Record], ours: dict[int, Configuration], theirs: dict[int, Configuration], workload: Workload
) -> bool:
    """Whether our load may be as fast as theirs by the finals of all contexts together; yes where noise hides it."""
    done = as_done(records)
    mine, other = (
        _fastest(done, side[max(side)].load_group, list(theirs), workload.objective) for side in (ours, theirs)
    )
    if mine and other:
        return _near(_overall(done, mine, other, workload))
    return not any(configuration in _broken(done, context) for context, configuration in ours.items())


def _fastest(
    records: list[Record], group: LoadGroup, contexts: list[int], objective: Objective
) -> dict[int, Configuration]:
    """The fastest of a load group that was measured again at each context; empty where it has none at one of them."""
    ranked = {context: tied(records, group, context, objective) for context in contexts}
    return {context: found[0] for context, found in ranked.items()} if all(ranked.values()) else {}


def _overall(
    records: list[Record], ours: dict[int, Configuration], theirs: dict[int, Configuration], workload: Workload
) -> tuple[float, float, float]:
    """`speedup` of what `best_group` maximizes: of all contexts together, with their errors combined."""
    gain, terms = 0.0, []
    for side, sign in ((ours, 1), (theirs, -1)):
        found = {context: _evidence(records, configuration, context) for context, configuration in side.items()}
        rounds = {context: _log_rounds(evidence, workload.objective) for context, evidence in found.items()}
        rates = {context: math.exp(statistics.median(values)) for context, values in rounds.items()}
        gain += sign * math.log(_mean(rates, workload))
        terms += [(share, rounds[context]) for context, share in _shares(rates, workload).items()]
    return _interval(gain, terms)


def _shares(rates: dict[int, float], workload: Workload) -> dict[int, float]:
    """How much of ln(`_mean`) each context's ln(rate) moves: all alike, or with a mix by the time that they take."""
    mix = dict(zip(workload.contexts, workload.mix, strict=True)) if workload.mix else rates
    time = {context: mix[context] / rate for context, rate in rates.items()}
    return {context: share / sum(time.values()) for context, share in time.items()}


def tied(
    records: Iterable[Record],
    group: LoadGroup,
    context: int,
    objective: Objective,
    beside: Configuration | None = None,
    any_load: bool = False,
) -> list[Configuration]:
    """Of what was measured again of a load group at this context the fastest, then what is within error of it.

    Each is compared with the fastest alone, since being within error does not carry over from one to the next. `beside`
    takes part whatever it loads. With `any_load` other load groups' are told too if they are within error of that
    fastest, and all are told by their rates.
    """
    done = as_done(records)
    finals = [r.configuration for r in _sound(done, context) if r.stage == "final"]
    evidence = {c: _evidence(done, c, context) for c in finals}
    rate = {c: statistics.median(_log_rounds(found, objective)) for c, found in evidence.items()}
    ranked = sorted(evidence, key=lambda c: (-rate[c], c.simplicity))
    own = [c for c in ranked if c.load_group == group or c == beside]
    told = ranked if any_load else own
    return [c for c in told if own and (c == own[0] or _within(speedup(evidence[c], evidence[own[0]], objective)))]


def _within(compared: tuple[float, float, float]) -> bool:
    """Whether a ratio is 1 within a known error."""
    _, low, high = compared
    return math.isfinite(high) and low <= 1 <= high


def _simplest(
    records: list[Record],
    chosen: Configuration,
    baseline: Configuration | None,
    context: int,
    objective: Objective,
) -> Configuration:
    """Of what tied when it was measured again, the simplest that is near the fastest; the chosen where nothing was.

    Where the fastest is significantly faster than the baseline, so is what is recommended. Noise that kept the chosen
    from being measured again does not make room for what is slower.
    """
    ties = tied(records, chosen.load_group, context, objective)
    if ties and _hidden(records, chosen, ties[0], context, objective):
        return chosen

    def gains(configuration: Configuration) -> bool:
        return _compare(records, configuration, baseline, context, objective)[1] > 1

    good = [c for c in ties if _compare(records, c, ties[0], context, objective)[0] >= NEAR]
    return min([c for c in good if gains(c) or not gains(ties[0])] or [chosen], key=lambda c: c.simplicity)


def _hidden(
    records: list[Record], configuration: Configuration, fastest: Configuration, context: int, objective: Objective
) -> bool:
    """Whether it was not soundly measured again, and is faster than the fastest that was by all that is known."""
    again = any(r.configuration == configuration and r.stage == "final" for r in _sound(records, context))
    return not again and _compare(records, configuration, fastest, context, objective)[1] > 1


def _sound(records: list[Record], context: int) -> list[Record]:
    """What was ok at this context and never failed there."""
    broken = _broken(records, context)
    here = [record for record in records if record.outcome == "ok" and record.context_tokens == context]
    return [record for record in here if record.configuration not in broken]


def _broken(records: Iterable[Record], context: int) -> set[Configuration]:
    """What failed at this context at least once. Too little time and too much noise are no failures of its own."""
    passing = ("ok", "timeout", "unstable")
    return {r.configuration for r in records if r.context_tokens == context and r.outcome not in passing}


def speedup(ours: list[Record], theirs: list[Record], objective: Objective) -> tuple[float, float, float]:
    """How many times faster, with a 95 % interval: Welch's t on the logarithms of the rounds' rates."""
    a, b = (_log_rounds(records, objective) for records in (ours, theirs))
    return _interval(statistics.median(a) - statistics.median(b), [(1, a), (1, b)])


def _interval(gain: float, terms: list[tuple[float, list[float]]]) -> tuple[float, float, float]:
    """exp(gain) with a 95 % interval; a gain is made of the medians of the terms' values, times their factors."""
    if any(len(values) < 2 for _, values in terms):
        return math.exp(gain), 0.0, math.inf
    parts = [factor**2 * statistics.variance(values) / len(values) for factor, values in terms]
    error = math.sqrt(sum(parts))
    if error == 0:
        return math.exp(gain), math.exp(gain), math.exp(gain)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, (_, v) in zip(parts, terms, strict=True))
    half = _t95(freedom) * error * math.sqrt(math.pi / 2)  # the median's efficiency
    return math.exp(gain), math.exp(gain - half), math.exp(gain + half)


def _log_rounds(records: list[Record], objective: Objective) -> list[float]:
    """ln(rate) of every round of every record."""
    return [math.log(rate) for record in records for rate in record.round_rates(objective)]


def _t95(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5).

    Below 3 degrees of freedom the expansion is too low: there the next lower whole number's value stands.
    """
    if freedom < 3:
        return 12.706 if freedom < 2 else 4.303
    z = statistics.NormalDist().inv_cdf(0.975)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


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
    records, baselines, finalists = as_done(records), _at(baselines), _at(chosen)
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
            loads = [r.load_s for r in _evidence(records, chosen[rule.max_context_tokens], rule.max_context_tokens)]
            rule.reload_s = statistics.median([seconds for seconds in loads if seconds is not None] or [0.0])
    stock = [
        Baseline(
            context_tokens=context,
            load=load_of(configuration),
            settings=settings_of(configuration),
            expected=expected_of(_evidence(records, configuration, context)),
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


def settle(
    records: list[Record],
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    workload: Workload,
    reloads: bool = False,
) -> dict[int, Configuration]:
    """The simplest of what was fastest when it was measured again, or stock where that is not significantly faster.

    First of the load groups, by all contexts together, unless there are reloads; then at each context.
    """
    records, baselines = as_done(records), _at(baselines)
    chosen = _standing(records, _at(chosen), workload.objective)
    contexts = [context for context in chosen if context in workload.contexts]
    stock = _stock(records, contexts, baselines, reloads)
    against = stock or baselines
    if contexts and not reloads:
        chosen = _of_the_best_load(records, chosen, contexts, against, workload)
    for context in contexts:
        chosen[context] = _simplest(records, chosen[context], against.get(context), context, workload.objective)
    faster = [c for c in stock if _compare(records, chosen[c], stock[c], c, workload.objective)[1] > 1]
    return stock if stock and not faster else chosen


def _of_the_best_load(
    records: list[Record],
    chosen: dict[int, Configuration],
    contexts: list[int],
    baselines: dict[int, Configuration],
    workload: Workload,
) -> dict[int, Configuration]:
    """The chosen, or the fastest of another load group that the finals of all contexts together prefer.

    That is the simplest of the load groups that tie with the fastest and are near it. Where the fastest is somewhere
    significantly faster than the baseline, so is it. What was not measured again at every context takes no part; where
    the chosen failed, only what is faster than the baseline takes its place, and where noise hides it nothing does.
    """
    objective, ours = workload.objective, chosen[max(contexts)].load_group
    sides = {group: _fastest(records, group, contexts, objective) for group in _measured_again(records)}
    sides = {group: side for group, side in sides.items() if side}
    outcomes = [
        {r.outcome for r in records if (r.configuration, r.context_tokens, r.stage) == (chosen[c], c, "final")}
        for c in contexts
    ]
    if any(found and "ok" not in found for found in outcomes):
        return chosen

    def gains(side: dict[int, Configuration]) -> bool:
        return any(_compare(records, side[c], baselines.get(c), c, objective)[1] > 1 for c in contexts)

    if ours not in sides:
        sides = {group: side for group, side in sides.items() if gains(side)}
        if not sides:
            return chosen
    simplest_first = sorted(sides, key=lambda group: group.simplicity)
    leader = sides[simplest_first[0]]
    for group in simplest_first:
        if _overall(records, sides[group], leader, workload)[0] > 1:
            leader = sides[group]
    for group in simplest_first:
        compared = _overall(records, sides[group], leader, workload)
        alike = compared[0] >= NEAR and _within(compared) and (gains(sides[group]) or not gains(leader))
        if sides[group] is leader or alike:
            break
    if group == ours:
        return chosen
    elsewhere = {c: between for c, between in chosen.items() if c not in contexts and between.load_group == group}
    return {**elsewhere, **sides[group]}


def _measured_again(records: list[Record]) -> set[LoadGroup]:
    return {record.configuration.load_group for record in records if record.stage == "final"}


def _loads_note(
    records: list[Record], chosen: dict[int, Configuration], baselines: dict[int, Configuration], workload: Workload
) -> str:
    """Which other load groups were within error of the chosen one, over all contexts, and are not as simple."""
    contexts = [context for context in chosen if context in workload.contexts]
    if all(chosen[context] == baselines.get(context) for context in contexts):
        return ""
    ours, note = chosen[max(contexts)].load_group, ""
    mine = _fastest(records, ours, contexts, workload.objective)
    for group in sorted(_measured_again(records) - {ours}, key=lambda group: group.simplicity):
        theirs = _fastest(records, group, contexts, workload.objective)
        if mine and theirs and ours.simplicity < group.simplicity:
            compared = _overall(records, theirs, mine, workload)
            if _within(compared):
                loads = Configuration(**vars(group)).differs_from(Configuration(**vars(ours)))
                over = "over all contexts, " * (len(contexts) > 1)
                note += f"; {over}loading {loads} instead ties ({compared[0]:.2f} times as fast), "
                note += "and the simpler load stands"
    return note


def _at(choice: dict[int, Configuration]) -> dict[int, Configuration]:
    """Each as it is carried out at its context."""
    return {context: configuration.at(context) for context, configuration in choice.items()}


def _stock(
    records: list[Record], contexts: list[int], baselines: dict[int, Configuration], reloads: bool
) -> dict[int, Configuration]:
    """The baseline per context, of one load group unless reloads are asked for; nothing where one is missing.

    Baselines of two groups are those of a budget that binds at long contexts: what runs there is taken for the short
    ones as well, where it was measured.
    """
    for longest in sorted(baselines, reverse=True):
        kept = {}
        for context in contexts:
            same = [baselines[c] for c in (context, longest) if c in baselines]
            same = [b for b in same if reloads or b.load_group == baselines[longest].load_group]
            sound = [b for b in same if _evidence(records, b, context) and b not in _broken(records, context)]
            if sound and context in baselines:
                kept[context] = sound[0]
        if len(kept) == len(contexts):
            return kept
    return {}


def _standing(
    records: list[Record], chosen: dict[int, Configuration], objective: Objective
) -> dict[int, Configuration]:
    """The chosen, or the next best of the load group where the chosen failed when it was measured again."""
    standing = {}
    for context, configuration in chosen.items():
        if configuration not in _broken(records, context):
            standing[context] = configuration
        elif (best := best_in_group(records, configuration.load_group, context, objective)) is not None:
            standing[context] = best.configuration
    return standing


def _compare(
    records: list[Record], ours: Configuration, theirs: Configuration | None, context: int, objective: Objective
) -> tuple[float, float, float]:
    if theirs is None:
        return math.inf, math.inf, math.inf
    if ours == theirs:
        return 1.0, 1.0, 1.0
    return speedup(_evidence(records, ours, context), _evidence(records, theirs, context), objective)


def _evidence(records: list[Record], configuration: Configuration, context: int) -> list[Record]:
    """The records that a claim about a configuration rests on: the finals, else what the search measured."""
    here = [r for r in records if r.configuration == configuration and r.context_tokens == context and r.tokens_per_s]
    finals = [record for record in here if record.stage == "final" and record.outcome in ("ok", "quality_loss")]
    return finals or here


def _rule(
    records: list[Record],
    configuration: Configuration,
    baseline: Configuration | None,
    context: int,
    workload: Workload,
) -> Rule:
    evidence = _evidence(records, configuration, context)
    ratio, low, high = _compare(records, configuration, baseline, context, workload.objective)
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
        again = any(r.configuration == other and r.stage == "final" for r in _sound(records, context))
        gain, (least, _) = unrestricted.gain, unrestricted.gain_interval or (0, 0)
        if again:
            gain, least, _ = _compare(records, other, configuration, context, workload.objective)
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
    alike = [c for c in others if _within(_compare(looks, c, ours, context, objective))]
    found = []
    for other, basis in [*((c, records) for c in finals if c != ours), *((c, looks) for c in alike)]:
        gain, low, high = _compare(basis, other, ours, context, objective)
        evidence = _evidence(basis, other, context)
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
    searched = [record for record in _sound(records, context) if record.stage in ("search", "baseline")]
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
    failed = [length for length in between if chosen[context] in _broken(records, length)]
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
        half = _t95(len(rounds) - 1) * median_error(rounds)
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
