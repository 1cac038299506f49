"""The choice per context and the policy file: what to load, what to do at each prompt length, and the evidence.

One load group serves all contexts. It is the one with the highest sum over the workload's contexts of ln(rate), so that
a context counts by how many times faster it gets and not by its tokens/s. A recommendation is significant or it is the
baseline: finalists are measured again, interleaved with the baseline, and compared by Welch's t on the logarithms of
their rounds' rates; within error, the simpler configuration stands.
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
)

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).parent / "policy.schema.json"
TIE = 0.97  # a simpler configuration must reach this share of the best rate to be called a tie


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
    """What changes per request. `draft` is none, prompt-lookup or model (the load group's)."""

    draft: Literal["none", "prompt-lookup", "model"]
    depth: int = Field(ge=0, le=16)
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
    """Prompts of up to `max_context_tokens` tokens (and longer than the rule before)."""

    max_context_tokens: int = Field(gt=0)
    settings: Settings
    expected: Expected
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    tie: bool = False
    note: str = ""
    evidence: Evidence = Field(default_factory=Evidence)


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
            if rule.settings.draft == "model" and self.load.draft == "none":
                raise ValueError("a rule uses a draft model, but load.draft is none")
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
        return to_configuration(self.load, rule.settings)


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
    """The load group with the highest sum of ln(rate) among those that are ok at the most contexts."""
    rates: dict[LoadGroup, dict[int, float]] = {}
    for record in records:
        if record.outcome == "ok":
            at = rates.setdefault(record.configuration.load_group, {})
            rate = record.rate(workload.objective)
            at[record.context_tokens] = max(at.get(record.context_tokens, 0), rate)
    if not rates:
        return None
    return max(rates, key=lambda group: (len(rates[group]), sum(math.log(rate) for rate in rates[group].values())))


def best_in_group(records: Iterable[Record], group: LoadGroup, context: int, objective: Objective) -> Record | None:
    """The simplest of the records that are as fast as the group's fastest at this context, within error."""
    records = list(records)
    broken = _broken(records, context)
    here = [
        record
        for record in records
        if record.outcome == "ok"
        and record.context_tokens == context
        and record.configuration.load_group == group
        and record.configuration not in broken
    ]
    if not here:
        return None
    best = max(here, key=lambda record: record.rate(objective))
    ties = [
        record
        for record in here
        if record.rate(objective) >= TIE * best.rate(objective) and speedup([best], [record], objective)[1] <= 1
    ]
    return min([best, *ties], key=lambda record: (record.configuration.complexity, -record.rate(objective)))


def _broken(records: Iterable[Record], context: int) -> set[Configuration]:
    """What failed at this context at least once. Too little time and too much noise are no failures of its own."""
    passing = ("ok", "timeout", "unstable")
    return {r.configuration for r in records if r.context_tokens == context and r.outcome not in passing}


def speedup(ours: list[Record], theirs: list[Record], objective: Objective) -> tuple[float, float, float]:
    """How many times faster, with a 95 % interval: Welch's t on the logarithms of the rounds' rates."""
    a, b = (_log_rounds(records, objective) for records in (ours, theirs))
    gain = statistics.median(a) - statistics.median(b)
    if len(a) < 2 or len(b) < 2:
        return math.exp(gain), 0.0, math.inf
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return math.exp(gain), math.exp(gain), math.exp(gain)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (a, b), strict=True))
    half = _t95(freedom) * error * math.sqrt(math.pi / 2)  # the median's efficiency
    return math.exp(gain), math.exp(gain - half), math.exp(gain + half)


def _log_rounds(records: list[Record], objective: Objective) -> list[float]:
    """ln(rate) of every round of every record."""
    values = []
    for record in records:
        for number in sorted({sample["round"] for sample in record.samples}):
            samples = [sample for sample in record.samples if sample["round"] == number]
            ttft = sum(sample["ttft_s"] for sample in samples)
            decode = sum(sum(sample["step_s"]) for sample in samples)
            tokens = sum(sample["new_tokens"] for sample in samples)
            match objective:
                case "end-to-end":
                    rate = tokens / (ttft + decode)
                case "decode":
                    rate = (tokens - len(samples)) / decode
                case "ttft":
                    rate = len(samples) / ttft
            values.append(math.log(rate))
    return values


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
    drafts: Iterable[dict[str, Any]] = (),
) -> Policy | None:
    """The policy of the chosen configurations, or of the baseline where they are not significantly faster anywhere.

    Rests on the records of stage `final` where there are some. None where nothing is feasible.
    """
    chosen = _standing(records, chosen, workload.objective)
    comparisons = {
        context: _compare(records, configuration, baselines.get(context), context, workload.objective)
        for context, configuration in chosen.items()
    }
    faster = [c for c, (_, low, _) in comparisons.items() if low > 1]
    no_baseline = [c for c in chosen if c not in baselines]
    if not faster and not no_baseline and chosen:
        same_group = baselines[max(baselines)].load_group
        kept = {c: b for c, b in baselines.items() if b.load_group == same_group and b not in _broken(records, c)}
        if set(kept) == set(chosen):
            chosen = kept
    rules = []
    for context in sorted(chosen):
        rules.append(_rule(records, chosen[context], baselines.get(context), context, workload))
    if not rules:
        return None
    load = load_of(chosen[max(chosen)])
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
        drafts=[ModelInfo(**draft) for draft in drafts if draft["path"] == load.draft],
        budget_bytes=budget.bytes,
        environment=environment,
        workload=workload_info,
        load=load,
        rules=rules,
        baseline=stock,
    )


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
    if baseline is None:
        note = "nothing stock fits the budget here"
    elif configuration == baseline:
        note = "the baseline: nothing measured was significantly faster"
    elif low > 1:
        note = f"{ratio:.2f} times the baseline, 95 % interval {low:.2f} to {high:.2f}"
    elif high < 1:
        note = f"slower than the baseline here ({ratio:.2f}); it is the price of one load for all contexts"
    else:
        note = f"a tie with the baseline ({ratio:.2f}, 95 % interval {low:.2f} to {high:.2f})"
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
    )


def load_of(configuration: Configuration) -> Load:
    return Load(**vars(configuration.load_group))


def settings_of(configuration: Configuration) -> Settings:
    draft = configuration.draft
    if configuration.has_draft_model:
        draft = "model" if configuration.depth else "none"
    return Settings(
        draft=draft,  # type: ignore[arg-type] # validated by pydantic
        depth=configuration.depth,
        cache=configuration.cache,
        prefill_chunk=configuration.prefill_chunk,
        launch=configuration.launch,  # type: ignore[arg-type]
    )


def expected_of(evidence: list[Record]) -> Expected:
    """Medians over the records; the highest footprint that any of them saw; intervals that hold all of theirs."""
    with_quality = next((r for r in evidence if r.perplexity_ratio is not None), evidence[0])

    def middle(name: str) -> float:
        return float(statistics.median(getattr(record, name) for record in evidence))

    intervals = [record.tokens_per_s_interval for record in evidence if record.tokens_per_s_interval is not None]
    return Expected(
        tokens_per_s=middle("tokens_per_s"),
        tokens_per_s_interval=(min(low for low, _ in intervals), max(high for _, high in intervals))
        if intervals
        else None,
        decode_tokens_per_s=middle("decode_tokens_per_s"),
        ttft_s=middle("ttft_s"),
        peak_bytes=max(record.peak_bytes or 0 for record in evidence),
        perplexity_ratio=with_quality.perplexity_ratio,
        perplexity_ratio_interval=with_quality.perplexity_ratio_interval,
        acceptance=evidence[0].acceptance,
    )
