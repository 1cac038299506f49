"""What crosses every module line: frozen dataclasses of JSON types, and the reading of sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

Outcome = Literal[
    "ok",
    "over_budget",
    "out_of_memory",
    "unsupported",
    "quality_loss",
    "wrong_output",
    "unstable",
    "timeout",
    "crashed",
]
Objective = Literal["end-to-end", "decode", "ttft"]
OUTCOMES: tuple[Outcome, ...] = Outcome.__args__  # type: ignore[attr-defined]
OBJECTIVES: tuple[Objective, ...] = Objective.__args__  # type: ignore[attr-defined]
_FIGURES: dict[Objective, str] = {"end-to-end": "tokens_per_s", "decode": "decode_tokens_per_s", "ttft": "ttft_s"}

WEIGHTS = ("bf16", "fp32", "bnb-int8", "bnb-nf4", "bnb-fp4", "quanto-int8", "quanto-int4", "checkpoint")
LM_HEADS = ("bf16", "fp32", "int8", "int4", "nf4")
HEAD_WEIGHTS = {"int8": "quanto-int8", "int4": "quanto-int4", "nf4": "bnb-nf4"}  # the word for weights stored alike
EMBEDDINGS = ("device", "host")
CACHES = (
    "dynamic",
    "static",
    "quantized-8",
    "quantized-4",
    "quantized-2",
    "quantized-fp8",
    "offloaded",
    "sliding",
)
ATTENTIONS = ("eager", "sdpa", "split_kv", "flash_attention_2", "flash_attention_3", "flex_attention")
LAUNCHES = ("eager", "graph", "compile")
SPECULATIONS = ("constant", "adaptive")
_ORDER = ("none", "prompt-lookup", *WEIGHTS, *LM_HEADS, *EMBEDDINGS, *CACHES, *ATTENTIONS, *LAUNCHES, *SPECULATIONS)

MIB = 2**20  # bytes
ALLOCATOR = "expandable_segments:True"  # PyTorch's, of whoever measures and whoever deploys
TASK_QUESTIONS = 32  # of a task, the first so many are asked; chosen, not measured


@dataclass(frozen=True)
class LoadGroup:
    """The knobs that need a reload to change."""

    weights: str = "bf16"
    lm_head: str = "bf16"
    embeddings: str = "device"
    draft: str = "none"  # "none", or the folder or ID of a draft model that is resident
    draft_weights: str = "none"
    attention: str = "sdpa"

    @property
    def simplicity(self) -> tuple[Any, ...]:
        """Sorts the simplest first, by `Configuration.simplicity` of these knobs with all others stock."""
        return Configuration(**vars(self)).simplicity


@dataclass(frozen=True)
class Configuration:
    """One choice for every knob (the words are explained in the README).

    `draft` is `none`, `prompt-lookup`, or the folder or ID of a draft model; with a draft model, depth 0 means that
    it is resident but idle. `depth` is the most tokens that a verification judges: always so many where `speculation`
    is `constant`, as many as have lately paid where it is `adaptive`. `prefill_chunk` 0 means the whole prompt in one
    pass.
    """

    weights: str = "bf16"
    lm_head: str = "bf16"
    embeddings: str = "device"
    draft: str = "none"
    draft_weights: str = "none"
    depth: int = 0
    speculation: str = "constant"
    cache: str = "dynamic"
    attention: str = "sdpa"
    prefill_chunk: int = 0
    launch: str = "eager"

    def __post_init__(self) -> None:
        """Settings without effect take their neutral value, so that equal behaviour compares equal."""
        if self.draft == "none":
            object.__setattr__(self, "depth", 0)
        if self.draft == "prompt-lookup" and self.depth == 0:
            object.__setattr__(self, "draft", "none")
        if self.depth < 2:
            object.__setattr__(self, "speculation", "constant")
        if self.draft in ("none", "prompt-lookup"):
            object.__setattr__(self, "draft_weights", "none")
        elif self.draft_weights == "none":
            object.__setattr__(self, "draft_weights", self.weights)

    @property
    def has_draft_model(self) -> bool:
        return self.draft not in ("none", "prompt-lookup")

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths that a verification may have, ascending: few where it adapts, as each is a step to be recorded."""
        fewer = (0, 1, 2, 4, 8) if self.speculation == "adaptive" else ()
        return (*(depth for depth in fewer if depth < self.depth), self.depth)

    @property
    def load_group(self) -> LoadGroup:
        return LoadGroup(
            self.weights,
            self.lm_head,
            self.embeddings,
            self.draft if self.has_draft_model else "none",
            self.draft_weights,
            self.attention,
        )

    @property
    def quality_key(self) -> tuple[str, ...]:
        """The knobs that can change what the model says; speculation and launch change speed only (promise 3)."""
        chunk = str(self.prefill_chunk) if self.cache.startswith("quantized") else "any"
        return (self.weights, self.lm_head, self.cache, self.attention, chunk)

    def at(self, context: int) -> Configuration:
        """The same thing at prompts of `context` tokens: one that fits its first chunk is prefilled whole."""
        return self.replace(prefill_chunk=0) if self.prefill_chunk >= context else self

    @property
    def complexity(self) -> int:
        """How many knobs differ from the stock setting."""
        stock = Configuration(weights=self.weights)
        return sum(getattr(self, f.name) != getattr(stock, f.name) for f in dataclasses.fields(self))

    @property
    def simplicity(self) -> tuple[Any, ...]:
        """Sorts the simplest first, the same in every run; a tie goes to the simplest (promise 7).

        By the number of knobs that differ from the stock setting; of as many, knob by knob in the order of the fields:
        words as the tuples above list them, prompt lookup between no draft and a draft model, numbers ascending.
        """
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        ranks = ((_ORDER.index(v) if v in _ORDER else len(_ORDER), v) if isinstance(v, str) else v for v in values)
        return (self.complexity, *ranks)

    def differs_from(self, other: Configuration) -> str:
        """The knobs in which it differs, as `knob=value, knob=value`."""
        knobs = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return ", ".join(f"{knob}={str(getattr(self, knob)).rpartition('/')[2]}" for knob in knobs)

    def replace(self, **changes: Any) -> Configuration:
        return dataclasses.replace(self, **changes)

    def key(self) -> str:
        """A stable text: equal for configurations that are the same thing."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Budget:
    """The most that the footprint may ever be, on one device: `Budget.of("6.5GB", "cuda:0")`."""

    bytes: int
    device: str = "cpu"  # "cpu" or "cuda:N"

    @classmethod
    def of(cls, size: str, device: str = "cpu") -> Budget:
        """A size as `--budget` takes it: GB is 10^9 bytes, GiB 2^30. Raises ValueError for what is none."""
        return cls(parse_bytes(size), device)


@dataclass(frozen=True)
class Workload:
    """What is asked of the model: prompt lengths, new tokens per request, and where prompts and text come from."""

    contexts: tuple[int, ...] = (512, 2048, 4096)
    mix: tuple[float, ...] = ()  # share of the requests that each context has, in sum 1; empty where nobody knows
    new_tokens: int = 128
    objective: Objective = "end-to-end"
    max_quality_loss: float = 0.05
    max_task_loss: float = 0.05  # points of F1 below the reference's answers
    text: str | None = None  # file of evaluation text; None is the held-out text of the bundled pair
    prompts: str | None = None  # JSON Lines file with a "prompt" string a line; None cuts them from the text
    task: str | None = None  # JSON Lines file with a "question" and an "answer" string a line

    def __post_init__(self) -> None:
        """JSON has lists only."""
        object.__setattr__(self, "contexts", tuple(self.contexts))
        object.__setattr__(self, "mix", tuple(self.mix))


@dataclass(frozen=True)
class Record:
    """One measured (configuration, context). Missing figures are None: a failure never becomes a number.

    Rates are tokens per second with a 95 % interval of the median over `samples`; bytes are peaks over load and
    measurement. `samples` holds one entry per timed generation: `prompt`, `new_tokens`, `ttft_s`, `decode_s`,
    `token_s` (seconds of each decode step), `tokens_per_step`, `proposed`, `accepted`. `memory` splits the footprint
    by owner, in bytes. `quality` holds per-window log-probabilities' summaries and intervals. The task's figures are
    those of `measure.task.figures`.
    """

    configuration: Configuration
    context_tokens: int
    outcome: Outcome
    reason: str = ""
    tokens_per_s: float | None = None
    tokens_per_s_interval: tuple[float, float] | None = None
    spread: float | None = None  # standard deviation of the rounds' tokens/s over their median
    decode_tokens_per_s: float | None = None
    decode_tokens_per_s_interval: tuple[float, float] | None = None
    ttft_s: float | None = None
    ttft_s_interval: tuple[float, float] | None = None
    acceptance: float | None = None
    tokens_per_verification: float | None = None
    mean_depth: float | None = None  # drafted tokens per decode step, those without any included
    peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    base_bytes: int | None = None  # what the process held on the device before any weight (the CUDA context)
    memory: dict[str, int] = field(default_factory=dict)
    witness: str = ""  # the instrument that saw peak_bytes
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: tuple[float, float] | None = None
    kl_divergence: float | None = None
    kl_divergence_p99: float | None = None
    top1_agreement: float | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    task_exact_match: float | None = None
    task_exact_match_interval: tuple[float, float] | None = None
    task_f1: float | None = None
    task_f1_interval: tuple[float, float] | None = None
    task_loss: float | None = None  # points of F1 below the reference's own answers
    task_loss_interval: tuple[float, float] | None = None
    load_s: float | None = None
    measure_s: float | None = None
    stage: str = "search"  # "baseline", "search", "final" (measured again) or "boundary" (between contexts)
    samples: tuple[dict[str, Any], ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)  # clocks, temperature and load while it was measured

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_interval")):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if value is not None else None)
        object.__setattr__(self, "samples", tuple(self.samples))

    def rate(self, objective: Objective) -> float:
        """What the objective maximizes: tokens/s, or first tokens per second for `ttft`."""
        value: float | None = getattr(self, _FIGURES[objective])
        if value is None:
            raise ValueError(f"a record with outcome {self.outcome} has no {objective} figure")
        return 1 / value if objective == "ttft" else value

    def round_rates(self, objective: Objective) -> list[float]:
        """What the objective maximizes, of every round that was timed."""
        values = per_round(self.samples, _FIGURES[objective])
        return [1 / value for value in values] if objective == "ttft" else values

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        known = {f.name for f in dataclasses.fields(cls)}
        data = {key: value for key, value in data.items() if key in known}
        return cls(**{**data, "configuration": Configuration(**data["configuration"])})


def per_round(samples: Iterable[dict[str, Any]], name: str) -> list[float]:
    """`tokens_per_s`, `decode_tokens_per_s` or `ttft_s` of every round of a record's samples."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        rounds.setdefault(sample["round"], []).append(sample)
    return [overall(samples, name) for samples in rounds.values()]


def overall(samples: list[dict[str, Any]], name: str) -> float:
    """The same of all samples together: all tokens over all time. Decoding that took no step has the rate 0."""
    ttft = sum(sample["ttft_s"] for sample in samples)
    decode = sum(sum(sample["step_s"]) for sample in samples)
    tokens = sum(sample["new_tokens"] for sample in samples)
    match name:
        case "tokens_per_s":
            return float(tokens / (ttft + decode))
        case "decode_tokens_per_s":
            return float((tokens - len(samples)) / decode) if decode else 0.0
        case _:
            return float(ttft / len(samples))


def median_error(values: Sequence[float]) -> float:
    """The standard error of the median of two values or more: the mean's, by the median's efficiency (sqrt(pi / 2))."""
    return statistics.stdev(values) / math.sqrt(len(values)) * math.sqrt(math.pi / 2)


def draft_head(draft_weights: str, device: str) -> str:
    """How a draft's lm_head is stored: in 4 bits where its weights are, and a GPU multiplies them as they are."""
    return "int4" if draft_weights == "quanto-int4" and device != "cpu" else "bf16"


def within_noise(perplexity_ratio: float, floor: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the unquantized model differs as much from itself: `floor` is run.json's, by the context's length."""
    return any(abs(math.log(perplexity_ratio)) <= measured["ln_ratio"] for measured in floor.values())


# Bytes of a unit, as accelerate reads them.
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
}


def parse_bytes(text: str) -> int:
    """A memory size in bytes: GB is 10^9 and GiB is 2^30, as accelerate reads them. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"'{text}' is not a memory size; write it like 6.5GB, 6200MiB or 6GiB")
    size = int(Fraction(match[1]) * _BYTE_UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError(f"'{text}' is not a positive memory size")
    return size


def parse_tokens(text: str) -> int:
    """A token count; k is 1024 tokens. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+)\s*([kK]?)\s*", text)
    if not match or int(match[1]) == 0:
        raise ValueError(f"'{text}' is not a positive token count; write it like 512 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def mib(size: int | float) -> str:
    """Bytes for a person: MiB, always."""
    return f"{size / MIB:,.0f} MiB"
