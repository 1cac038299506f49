"""The policy file: what to load, what to do at each prompt length, and the evidence. `rules` makes it of a choice."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config import (
    ATTENTIONS,
    CACHES,
    LM_HEADS,
    WEIGHTS,
    Configuration,
)

SCHEMA_VERSION = 1  # of a policy file, as SCHEMA_FILE describes it
SCHEMA_FILE = Path(__file__).parents[1] / "policy.schema.json"


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
            known = {field.alias or name for name, field in cls.model_fields.items()}
            missing = known - set(data)
            for key in sorted(set(data) - known):
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

    model_config = ConfigDict(serialize_by_alias=True)

    schema_version: Literal[1] = 1
    model: ModelInfo
    drafts: list[ModelInfo] = Field(default_factory=list)
    budget_bytes: int = Field(gt=0)
    environment: dict[str, Any]
    workload: dict[str, Any]
    load_group: Load = Field(alias="load")  # `load` reads a file
    rules: list[Rule] = Field(min_length=1)
    baseline: list[Baseline]

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in a file. Raises PolicyError for one that is missing, not JSON or not a policy."""
        path = Path(path)
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
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            raise PolicyError(f"{path}: {'.'.join(map(str, first['loc'])) or 'policy'}: {first['msg']}") from None

    @model_validator(mode="after")
    def _rules_ascend(self) -> Policy:
        limits = [rule.max_context_tokens for rule in self.rules]
        if limits != sorted(set(limits)):
            raise ValueError("rules must have ascending max_context_tokens")
        for rule in self.rules:
            if rule.settings.draft == "model" and (rule.load or self.load_group).draft == "none":
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
        return to_configuration(rule.load or self.load_group, rule.settings)


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


def write_policy(policy: Policy, path: Path) -> None:
    path.write_text(json.dumps(policy.model_dump(mode="json"), indent=2) + "\n")


def schema() -> dict[str, Any]:
    """The JSON Schema that autotune/policy.schema.json publishes."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


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
