"""A search driven by a measurement that is a formula: no model, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from autotune.config import MIB, Budget, Configuration, Outcome, Record, Workload
from autotune.results import read_records
from autotune.search.search import Search
from autotune.search.space import Space
from autotune.search.study import Studies
from tests.records import synthetic_record

CONTEXTS = (64, 256)
BUDGET = Budget(1000 * MIB)
IDENTITY = {"model": {"weights_sha256": "a"}, "workload": {"contexts": [64, 256]}, "budget": {"bytes": BUDGET.bytes}}
DRAFT = "/models/draft"


def space_of(**choices: tuple[Any, ...]) -> Space:
    """The stock configuration's space with some knobs opened, in the order in which they are asked for."""
    single = {"weights": ("bf16",), "lm_head": ("bf16",), "embeddings": ("device",), "draft": ("none",)}
    single |= {"draft_weights": ("bf16",), "depth": (4,), "cache": ("dynamic",), "attention": ("sdpa",)}
    return Space({**single, "prefill_chunk": (0,), "launch": ("eager",), **choices})


MIXED = space_of(
    weights=("bf16", "bnb-nf4", "quanto-int4"),
    draft=("none", "prompt-lookup", DRAFT),
    depth=(2, 4, 6),
    cache=("dynamic", "static", "quantized-4"),
    prefill_chunk=(0, 32),
    launch=("eager", "graph"),
)


def rate(c: Configuration, context: int) -> float:
    """Tokens/s with one optimum: quanto-int4, a draft model at depth 4, static cache, graph, long prompts in chunks."""
    speed = {"bf16": 30.0, "bnb-nf4": 35.0, "quanto-int4": 45.0}[c.weights]
    speed *= {"none": 1.0, "prompt-lookup": 1.1, DRAFT: 1.3}[c.draft] if c.depth else 1.0
    speed *= 1 - 0.05 * abs(c.depth - 4) if c.draft != "none" else 1.0
    speed *= {"dynamic": 1.0, "static": 1.2, "quantized-4": 0.8}[c.cache]
    speed *= 1.5 if c.launch == "graph" else 1.0
    return speed * (1.1 if (c.prefill_chunk > 0) == (context > 100) else 1.0)


class Fake:
    """Measures by formula, keeps what it was asked for."""

    def __init__(self, outcome: Callable[[Configuration, int], Outcome] = lambda c, context: "ok", **figures: Any):
        self.outcome, self.figures = outcome, figures
        self.calls: list[tuple[Configuration, int]] = []
        self.stages: list[str] = []
        self.on_call: Callable[[], None] = lambda: None

    def __call__(self, configuration: Configuration, context: int, stage: str) -> Record:
        self.calls.append((configuration, context))
        self.stages.append(stage)
        self.on_call()
        outcome = self.outcome(configuration, context)
        if outcome in ("out_of_memory", "unsupported", "timeout", "crashed"):
            return Record(configuration, context, outcome, "it failed", stage=stage, measure_s=1.0)
        over = {"over_budget": {"peak": BUDGET.bytes + MIB}, "quality_loss": {"ratio": 1.2}}.get(outcome, {})
        figures = {**over, **self.figures, "outcome": outcome, "stage": stage}
        figures["reason"] = "" if outcome == "ok" else "it is bad"
        return synthetic_record(configuration, context, (rate(configuration, context),) * 3, **figures)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def studies_in(folder: Path, identity: dict[str, Any] = IDENTITY, contexts: tuple[int, ...] = CONTEXTS) -> Studies:
    return Studies(url(folder), "run", identity, contexts, seed=0)


def search_in(
    folder: Path, space: Space, measure: Fake, *, contexts: tuple[int, ...] = CONTEXTS, **options: Any
) -> Search:
    stored = read_records(url(folder), "run") if (folder / "study.db").exists() else []
    known = {(record.configuration, record.context_tokens): record for record in stored}
    settings = {"fits": lambda configuration, context: "", "deadline": time.monotonic() + 300} | options
    workload = Workload(contexts=contexts)
    return Search(
        space=space,
        workload=workload,
        budget=BUDGET,
        studies=studies_in(folder, contexts=contexts),
        measure=measure,
        known=known,
        **settings,
    )


SHORT, LONG = Configuration(cache="static"), Configuration(cache="dynamic")
LOW, HIGH = 512, 2560  # the parts between them are 256 tokens long
BASELINES = [Configuration(), Configuration(weights="bnb-nf4")]
SMALL = space_of(weights=("bf16", "bnb-nf4"), cache=("dynamic", "static"), prefill_chunk=(0, 32))


def trials_in(search: Search, context: int) -> list[optuna.trial.FrozenTrial]:
    return search.studies.by_context[context].get_trials()


def searching(folder: Path, measure: Callable[[Configuration, int, str], Record]) -> Search:
    studies = Studies(f"sqlite:///{folder / 'study.db'}", "run", {}, (LOW, HIGH), 0)
    workload, space = Workload(contexts=(LOW, HIGH)), Space({"cache": ("static", "dynamic")})
    return Search(
        space=space,
        workload=workload,
        budget=Budget(10**9),
        studies=studies,
        measure=measure,
        fits=lambda c, context: "",
        deadline=time.monotonic() + 60,
    )
