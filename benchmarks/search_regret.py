"""How far the search's choice is from what an exhaustive sweep would have found, against what it cost to find.

A sweep (`sweep.py`) is replayed: the search of `autotune run`, its plan, its first candidates and its choice are the
real code, and a measurement is a recorded one. Time is what the sweep recorded: measuring, measuring quality where it
is not known yet, and loading where the load group changes. Noise is the sweep's: a measurement's rounds are drawn, with
replacement, from the rounds that were recorded. The truth about a configuration is the figure of all its rounds.

What held more than the replayed budget at its peak is `out_of_memory`, without figures: while loading, where loading
alone held more, else for its whole recorded time, as the cap may stop it at any point. All else is as it was recorded.

The share is that of the exhaustive cost: every pair measured once, every load group loaded once. The search is run anew
for each share, as its `--timeout`, from which it plans; finals and boundaries, which check a choice, are left out. The
others are asked on and on and looked at when each share is spent. To them a trial is one configuration, measured at
the contexts in ascending order with one load and ended by its first failure; their score is the geometric mean of the
rates. They describe the space as a user of Optuna would, every knob always asked for, do not know the plan, look up
what is known, and after ten known suggestions get one drawn from the rest. All choose by `choice.choose`.

Scores are the chosen configuration's true rate over that of the feasible optimum: the load group that serves the
workload fastest under this budget, and its fastest configuration at each context. One load serves all contexts, so a
context can score above 1 where another group is faster. No choice, or one that does not fit, scores 0. `policy` is the
geometric mean of the contexts' scores.

`warm start`, which is not asked for by default, is the same search beside the folder of an earlier run of the model,
under the widest budget, that spent 3 % of the cost.

A sweep need not hold the whole space. A suggestion that it does not hold stands, for every method, for the nearest one
that it holds: fewest other load knobs, then fewest other knobs, then the nearest depth. The optimum and the exhaustive
cost are then those of what the sweep holds.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import click
import optuna

from autotune import run
from autotune.config import Budget, Configuration, LoadGroup, Outcome, Record, Workload, mib, parse_bytes, per_round
from autotune.measure.throughput import hopeless
from autotune.model.shape import LayerShape, Linear, ModelShape
from autotune.policy.choice import best_group, choose
from autotune.request import Request
from autotune.results import frame
from autotune.samples import summarize
from autotune.search.finals import choice_by_search, finalists
from autotune.search.space import Space, Suggests, stock_configurations
from autotune.search.study import Studies
from autotune.search.watch import Watch

SHARES = (0.03, 0.05, 0.1, 0.2)  # of the exhaustive cost
SEARCH = "autotune"
WARM = "warm start"  # the same, beside the folder of an earlier run
EARLIER = 0.03  # of the exhaustive cost, which that one spent
MEDIAN, LOW = 0.98, 0.95  # of the optimum's rate, bars for median and 10th percentile in every context: set by us
WITHIN = 0.1  # of the exhaustive cost, by which the bars must be reached: set by us
INFEASIBLE = 0.1  # of the measurements may exceed the budget: set by us
UNLIMITED = 2**62  # bytes: under no budget
_REPEATS = 10  # known suggestions in a row after which a sampler gets one of the rest
_STUCK = 2000  # proposals in a row without a new measurement after which a method is at its end
_LOAD_KNOBS = ("weights", "lm_head", "embeddings", "draft", "draft_weights", "attention")
_OTHER_KNOBS = ("cache", "prefill_chunk", "launch")

Pair = tuple[Configuration, int]
Words = dict[str, Any]


class OutOfTime(Exception):
    """The next measurement would end after the share is spent."""


@dataclass(frozen=True)
class Line:
    """A recorded measurement, its time split into what is paid each time, for quality and for the load."""

    record: Record
    measure_s: float
    quality_s: float


@dataclass
class Sweep:
    """What was measured under no budget, at every context."""

    header: dict[str, Any]
    lines: dict[Pair, Line]
    load_s: dict[LoadGroup, float]
    load_peak: dict[LoadGroup, int]

    @cached_property
    def workload(self) -> Workload:
        return Workload(**self.header["workload"])

    @cached_property
    def configurations(self) -> list[Configuration]:
        return list(dict.fromkeys(configuration for configuration, _ in self.lines))

    @cached_property
    def space(self) -> Held:
        choices = {knob: tuple(words) for knob, words in self.header["space"].items()}
        space = Space(choices)
        held = tuple(c for c in self.configurations if space.parameters(c) is not None)
        idle = tuple(c for c in self.configurations if c.has_draft_model and not c.depth)
        return Held(choices, held=held, idle=idle)

    @cached_property
    def shapes(self) -> dict[str, ModelShape]:
        return {name: shape_of(data) for name, data in self.header["shapes"].items()}

    @cached_property
    def cost_s(self) -> float:
        """Every pair once, every load group once, quality where a sweep measures it."""
        return sum(line.measure_s for line in self.lines.values()) + sum(self.load_s.values()) + sum(self.quality_s)

    @cached_property
    def quality_s(self) -> list[float]:
        dearest: dict[tuple[Any, int], float] = {}
        for (configuration, context), line in self.lines.items():
            key = configuration.quality_key, context
            dearest[key] = max(dearest.get(key, 0.0), line.quality_s)
        return list(dearest.values())

    def feasible(self, budget: int) -> list[Record]:
        records = [line.record for line in self.lines.values()]
        return [r for r in records if r.outcome == "ok" and (r.peak_bytes or 0) <= budget]

    def optimum(self, budget: int) -> dict[int, float]:
        """The rate, at each context that it serves, of the load group that a sweep under this budget would choose."""
        records, objective = self.feasible(budget), self.workload.objective
        group = best_group(records, self.workload)
        best: dict[int, float] = {}
        for record in records:
            if record.configuration.load_group == group:
                best[record.context_tokens] = max(best.get(record.context_tokens, 0), record.rate(objective))
        return best

    def budgets(self) -> list[int]:
        """Three quartiles of the footprints, the widest first, and one that barely fits at every context."""
        peaks = sorted(r.peak_bytes or 0 for r in self.feasible(UNLIMITED))
        if not peaks:
            raise click.UsageError("nothing in the sweep was ok")
        least: dict[LoadGroup, dict[int, int]] = {}
        for record in self.feasible(UNLIMITED):
            at = least.setdefault(record.configuration.load_group, {})
            at[record.context_tokens] = min(at.get(record.context_tokens, 2**62), record.peak_bytes or 0)
        whole = [max(at.values()) for at in least.values() if len(at) == len(self.workload.contexts)]
        barely = math.ceil(1.005 * min(whole or [peaks[0]]))
        quartiles = [peaks[math.ceil(share * len(peaks)) - 1] for share in (0.75, 0.5, 0.25)]
        return sorted({max(size, barely) for size in [*quartiles, barely]}, reverse=True)


@dataclass(frozen=True)
class Held(Space):
    """The part of a space that a sweep holds; a suggestion outside it stands for the nearest one inside."""

    held: tuple[Configuration, ...] = ()
    idle: tuple[Configuration, ...] = ()  # with a draft model that is not used, which a search adds to a whole space

    @cached_property
    def _known(self) -> frozenset[Configuration]:
        return frozenset(self.held)

    def nearest(self, asked: Configuration) -> Configuration:
        if asked in self._known:
            return asked

        def distance(other: Configuration) -> tuple[int, int, int]:
            loads = sum(getattr(asked, knob) != getattr(other, knob) for knob in _LOAD_KNOBS)
            others = sum(getattr(asked, knob) != getattr(other, knob) for knob in _OTHER_KNOBS)
            return loads, others, abs(asked.depth - other.depth)

        return min(self.held, key=distance)

    def suggest(self, trial: Suggests) -> Configuration:
        return self.nearest(super().suggest(trial))

    def configurations(self) -> Iterator[Configuration]:
        fits = (
            c for c in self.held + self.idle if all(getattr(c, knob) in self.choices[knob] for knob in _LOAD_KNOBS[:3])
        )
        return (c for c in fits if self.parameters(c) is not None or c in self.idle)

    def seeds(self) -> Iterator[Configuration]:
        return iter(dict.fromkeys(self.nearest(configuration) for configuration in super().seeds()))


class Fixed:
    """Stands for an Optuna trial where every knob has its word already; an illegal one becomes the first legal one."""

    def __init__(self, words: Words):
        self.words = words

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        word = self.words.get(name.partition(" of ")[0])
        return word if word in choices else choices[0]


def words_of(space: Space, configuration: Configuration) -> Words:
    """A word for every knob that has a choice, where it has no effect as well."""
    open_knobs = {knob: choices for knob, choices in space.choices.items() if len(choices) > 1}
    own = {knob: getattr(configuration, knob) for knob in open_knobs}
    return {knob: own[knob] if own[knob] in choices else choices[0] for knob, choices in open_knobs.items()}


@dataclass
class Replay:
    """`trial.Trials`, with a sweep in place of a worker and its recorded costs as time."""

    sweep: Sweep
    budget: int
    end: float
    seed: int = 0
    now: float = 0.0
    loads: int = 0
    records: list[Record] = field(default_factory=list)
    resident: LoadGroup | None = None
    failed: dict[LoadGroup, Record] = field(default_factory=dict)
    scored: set[tuple[Any, int]] = field(default_factory=set)

    def learn(self, record: Record) -> None:
        raise AssertionError("a replay begins with nothing known")

    def measure(
        self,
        configuration: Configuration,
        context: int,
        *,
        timeout_s: float = 600,
        stage: str = "search",
        bar: float | None = None,
    ) -> Record:
        """As Trials.measure. Raises OutOfTime, and then nothing has happened."""
        line, group = self.sweep.lines[configuration, context], configuration.load_group
        make = partial(Record, configuration, context, stage=stage)
        if group in self.failed:
            failure = self.failed[group]
            return self._keep(make(outcome=failure.outcome, reason=failure.reason, measure_s=0.0))
        load_s = 0.0 if self.resident == group else self.sweep.load_s[group]
        outcome, reason = self._outcome(line.record)
        if reason.startswith("while loading"):
            self._spend(load_s)
            self.loads, self.resident = self.loads + 1, None
            record = make(outcome=outcome, reason=reason, measure_s=load_s)
            self.failed[group] = record
            return self._keep(record)
        figures: dict[str, Any] = {}
        seconds = line.measure_s
        if outcome != "out_of_memory" and line.record.samples:
            figures, spared_s = self._drawn(line.record, bar)
            key = configuration.quality_key, context
            seconds += 0.0 if key in self.scored else line.quality_s
            seconds -= spared_s
        if seconds > timeout_s:
            outcome, reason, figures, seconds = "timeout", f"measure took longer than {timeout_s:.0f} s", {}, timeout_s
        self._spend(load_s + seconds)
        self.loads += load_s > 0 or self.resident != group
        self.resident = group if outcome not in ("timeout", "crashed") else None
        if not figures:
            return self._keep(make(outcome=outcome, reason=reason, measure_s=load_s + seconds))
        self.scored.add((configuration.quality_key, context))
        kept = {f.name: getattr(line.record, f.name) for f in dataclasses.fields(Record)} | figures
        kept |= {"outcome": outcome, "reason": reason, "stage": stage, "load_s": self.sweep.load_s[group]}
        return self._keep(Record(**{**kept, "measure_s": seconds}))

    def _outcome(self, record: Record) -> tuple[Outcome, str]:
        group, over = record.configuration.load_group, "more than the budget"
        if (loading := self.sweep.load_peak.get(group, 0)) > self.budget:
            return "out_of_memory", f"while loading: {mib(loading)}, {over}"
        if (peak := record.peak_bytes or 0) > self.budget:
            return "out_of_memory", f"{mib(peak)}, {over}"
        return record.outcome, record.reason

    def _drawn(self, record: Record, bar: float | None) -> tuple[dict[str, Any], float]:
        """Figures of rounds drawn from the recorded ones, and the seconds that ending early spared."""
        rounds: dict[int, list[dict[str, Any]]] = {}
        for sample in record.samples:
            rounds.setdefault(sample["round"], []).append(sample)
        draw = random.Random(f"{self.seed} {record.configuration.key()} {record.context_tokens} {len(self.records)}")
        drawn = draw.choices(list(rounds.values()), k=len(rounds))
        taken = [{**sample, "round": number} for number, samples in enumerate(drawn) for sample in samples]
        rates = per_round(taken, "tokens_per_s")
        ends = (number for number in range(1, len(rates)) if bar is not None and hopeless(rates[:number], bar))
        last = next(ends, len(rates))
        spared_s = sum(sample["ttft_s"] + sum(sample["step_s"]) for sample in taken if sample["round"] >= last)
        taken = [sample for sample in taken if sample["round"] < last]
        figures = summarize(taken)
        figures.pop("drift")
        return {**figures, "samples": tuple(taken)}, spared_s

    def _spend(self, seconds: float) -> None:
        if self.now + seconds > self.end:
            raise OutOfTime
        self.now += seconds

    def _keep(self, record: Record) -> Record:
        self.records.append(record)
        return record


def search(
    sweep: Sweep, budget: int, seed: int, limit_s: float, beside: Path | None = None
) -> tuple[dict[int, Configuration], Replay]:
    """What `run.tune` does between preparing and measuring the finalists again, on a clock of its own.

    The search learns from the run folders `beside` it.
    """
    replay = Replay(sweep, budget, limit_s, seed)
    storage: Any = optuna.storages.InMemoryStorage()
    request = Request(
        model=Path("model"),
        drafts=[Path(name) for name in sweep.shapes if name != "model"],
        budget=Budget(budget, sweep.header["device"]),
        workload=sweep.workload,
        space=sweep.space,
        space_name=sweep.header["space_name"],
        out=(beside or Path()) / "replay",
        timeout_s=limit_s,
        storage=storage,
        seed=seed,
        started=0.0,
        warm_start=beside is not None,
    )
    studies = Studies(storage, request.study, {}, sweep.workload.contexts, seed)
    trials: Any = replay
    header = sweep.header | run_info(sweep)
    searching = run._search(request, sweep.space, sweep.shapes, studies, trials, header, Watch())
    searching.now = lambda: replay.now
    completing_s = min(run.COMPLETING_S, run.COMPLETING_SHARE * limit_s)
    searching.deadline = limit_s - completing_s
    fits, on_record = searching.fits, searching.on_record

    def held(configuration: Configuration, context: int) -> str:
        return fits(configuration, context) if (configuration, context) in sweep.lines else "not in the sweep"

    def learn(record: Record) -> None:
        deadline = searching.deadline
        on_record(record)
        searching.deadline = deadline  # without finals and boundaries there is no time to keep for them

    searching.fits, searching.on_record = held, learn
    stock = stock_configurations(header["environment"]["full_precision"], sweep.space)
    try:
        searching.baseline(stock, sure=run._SURE)
        searching.run()
        finalists(searching, stock, False, completing_s)
    except OutOfTime:
        pass
    return choice_by_search(searching, stock, False)[0], replay


def run_info(sweep: Sweep) -> dict[str, Any]:
    """What run.json says of the models; their names stand for what they hold."""
    drafts = [name for name in sweep.shapes if name != "model"]
    model, *others = ({"weights_sha256": name} for name in ("model", *drafts))
    return {"model": "model", "drafts": drafts, "identity": {"model": model, "drafts": others}}


def write_earlier(sweep: Sweep, folder: Path, seed: int) -> None:
    """The folder of a run under the widest budget, with 3 % of the cost and another seed."""
    budget = max(sweep.budgets())
    _, replay = search(sweep, budget, seed + 1000, EARLIER * sweep.cost_s)
    folder.mkdir()
    info = {"workload": dataclasses.asdict(sweep.workload), "budget": {"bytes": budget}, "study": "", "storage": None}
    info |= {"environment": sweep.header["environment"], **run_info(sweep)}
    (folder / "run.json").write_text(json.dumps(info))
    frame(replay.records).to_csv(folder / "trials.csv", index=False)


Proposals = Generator[Configuration, list[Record], None]


def at_random(sweep: Sweep, seed: int) -> Proposals:
    held = list(sweep.space.held)
    random.Random(seed).shuffle(held)
    while held:
        yield held.pop()


def climb(sweep: Sweep, seed: int) -> Proposals:
    """Coordinate hill climbing: every word of one knob after the other, from a random start until no knob helps."""
    draw, space = random.Random(seed), sweep.space
    while True:
        here = words_of(space, draw.choice(space.held))
        best = score(sweep, (yield space.suggest(Fixed(here)))) or 0.0
        idle = 0
        knobs = draw.sample(list(here), len(here))
        while idle < len(knobs):
            knob = knobs.pop(0)
            knobs.append(knob)
            idle += 1
            for word in draw.sample(space.choices[knob], len(space.choices[knob])):
                there = {**here, knob: word}
                reached = score(sweep, (yield space.suggest(Fixed(there)))) or 0.0
                if reached > best:
                    here, best, idle = there, reached, 0


def sampled(make: Callable[[int], Any], objectives: int, sweep: Sweep, seed: int) -> Proposals:
    """An Optuna sampler as it comes, failures told as FAIL; with two objectives, rate and perplexity ratio."""
    draw, space, seen, repeats = random.Random(seed), sweep.space, set(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = make(seed)
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"][:objectives])
    open_knobs = {knob: choices for knob, choices in space.choices.items() if len(choices) > 1}
    while True:
        if repeats >= _REPEATS:
            left = [configuration for configuration in space.held if configuration not in seen]
            if not left:
                return
            study.enqueue_trial(words_of(space, draw.choice(left)))
        trial = study.ask()
        words = {knob: trial.suggest_categorical(knob, choices) for knob, choices in open_knobs.items()}
        configuration = space.suggest(Fixed(words))
        repeats = repeats + 1 if configuration in seen else 0
        seen.add(configuration)
        records = yield configuration
        reached = score(sweep, records)
        if reached is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [reached, max(record.perplexity_ratio or 1.0 for record in records)][:objectives])


def score(sweep: Sweep, records: list[Record]) -> float | None:
    """The geometric mean of the rates; None where it did not run well at every context."""
    if len(records) < len(sweep.workload.contexts) or any(record.outcome != "ok" for record in records):
        return None
    return statistics.geometric_mean(record.rate(sweep.workload.objective) for record in records)


BASELINES: dict[str, Callable[[Sweep, int], Proposals]] = {
    "random": at_random,
    "TPE": partial(sampled, lambda seed: optuna.samplers.TPESampler(seed=seed), 1),
    "NSGA-II": partial(sampled, lambda seed: optuna.samplers.NSGAIISampler(seed=seed), 2),
    "GP": partial(sampled, lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=False), 1),
    "hill climbing": climb,
}


def baseline(
    method: str, sweep: Sweep, budget: int, seed: int, limits: list[float]
) -> Iterator[tuple[dict[int, Configuration], Replay]]:
    """One run of a method, looked at each time a limit is reached."""
    replay = Replay(sweep, budget, 0.0, seed)
    known: dict[Pair, Record] = {}

    def measured(configuration: Configuration) -> list[Record]:
        records = []
        for context in sorted(sweep.workload.contexts):
            pair = configuration, context
            if pair not in known:
                known[pair] = replay.measure(*pair)
            records.append(known[pair])
            if known[pair].outcome != "ok":
                break
        return records

    proposals = BASELINES[method](sweep, seed)
    asked: Configuration | None = next(proposals)
    stuck = 0
    for limit in limits:
        replay.end = limit
        try:
            while asked is not None and stuck < _STUCK:
                before = len(known)
                records = measured(asked)
                stuck = 0 if len(known) > before else stuck + 1
                asked = proposals.send(records)
        except OutOfTime:
            pass
        except StopIteration:
            asked = None
        yield choose(list(known.values()), sweep.workload), replay


def judged(sweep: Sweep, budget: int, chosen: dict[int, Configuration], replay: Replay) -> dict[str, Any]:
    """The figures of one choice."""
    objective, best = sweep.workload.objective, sweep.optimum(budget)
    sound = {(r.configuration, r.context_tokens): r.rate(objective) for r in sweep.feasible(budget)}
    scores = {c: sound.get((chosen[c], c), 0.0) / best[c] if c in chosen else 0.0 for c in best}
    over = [r for r in replay.records if r.outcome in ("out_of_memory", "over_budget")]
    return {
        "scores": {str(context): round(value, 4) for context, value in scores.items()},
        "policy": round(math.prod(scores.values()) ** (1 / len(scores)), 4),
        "measured": len(replay.records),
        "infeasible": len(over),
        "failed": sum(r.outcome != "ok" for r in replay.records) - len(over),
        "infeasible_recommendations": sum((chosen[c], c) not in sound for c in chosen),
        "loads": replay.loads,
        "cost": round(replay.now / sweep.cost_s, 4),
    }


def replayed(path: Path, shares: tuple[float, ...], task: tuple[str, int, int]) -> list[dict[str, Any]]:
    """One method, budget and seed at every share."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = read_sweep(path)
    method, budget, seed = task
    limits = [share * sweep.cost_s for share in shares]
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if method == WARM:
            write_earlier(sweep, Path(folder) / "earlier", seed)
        if method in (SEARCH, WARM):
            beside = Path(folder) if method == WARM else None
            runs: Iterator[Any] = (search(sweep, budget, seed, limit, beside) for limit in limits)
        else:
            runs = baseline(method, sweep, budget, seed, limits)
        for share, (chosen, replay) in zip(shares, runs, strict=True):
            figures = judged(sweep, budget, chosen, replay)
            own_s, began = time.perf_counter() - began, time.perf_counter()
            row = {"method": method, "budget_bytes": budget, "seed": seed, "share": share}
            rows.append({**row, **figures, "own_s": round(own_s, 3)})
    return rows


def shape_of(data: dict[str, Any]) -> ModelShape:
    def block(entry: dict[str, Any]) -> LayerShape:
        return LayerShape(**{**entry, "linears": tuple(Linear(*linear) for linear in entry["linears"])})

    return ModelShape(
        **{**data, "layers": tuple(block(entry) for entry in data["layers"]), "rest": block(data["rest"])}
    )


@cache
def read_sweep(path: Path) -> Sweep:
    """Configurations that a sweep which was not finished measured at some contexts only are left out."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    header, *found = [json.loads(line) for line in text[: text.rfind("\n")].splitlines()]
    return sweep_of(header, found)


def sweep_of(header: dict[str, Any], found: list[dict[str, Any]]) -> Sweep:
    contexts = header["workload"]["contexts"]
    records = [(Record.from_json(line["record"]), line) for line in found]
    at: dict[Configuration, int] = {}
    loads: dict[LoadGroup, list[float]] = {}
    peaks: dict[LoadGroup, int] = {}
    quality: dict[tuple[Any, int], float] = {}
    for record, line in records:
        group = record.configuration.load_group
        at[record.configuration] = at.get(record.configuration, 0) + 1
        loads.setdefault(group, [])
        if "load_s" in line:
            loads[group].append(line["load_s"])
        peaks[group] = max(peaks.get(group, 0), line.get("load_peak_bytes") or 0)
        key = record.configuration.quality_key, record.context_tokens
        quality[key] = max(quality.get(key, 0.0), line.get("quality_s", 0.0))
    lines = {}
    for record, line in records:
        if at[record.configuration] == len(contexts):
            seconds = line["took_s"] - line.get("load_s", 0.0) - line.get("quality_s", 0.0)
            key = record.configuration.quality_key, record.context_tokens
            lines[record.configuration, record.context_tokens] = Line(record, max(0.0, seconds), quality[key])
    kept = {configuration.load_group for configuration, _ in lines}
    load_s = {group: statistics.median(loads[group] or [0.0]) for group in kept}
    return Sweep(header, lines, load_s, peaks)


def quantile(values: list[float], share: float) -> float:
    """The lower one: of 20 values, the 10th percentile is the second smallest."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds (and budgets, where several are given) of one method at one share."""
    contexts = sorted({int(context) for row in rows for context in row["scores"]})
    by_context = {}
    for context in contexts:
        values = [row["scores"][str(context)] for row in rows if str(context) in row["scores"]]
        by_context[str(context)] = {"median": statistics.median(values), "p10": quantile(values, 0.1)}
    policy = [row["policy"] for row in rows]
    return {
        "contexts": by_context,
        "policy": {"median": statistics.median(policy), "p10": quantile(policy, 0.1), "mean": statistics.fmean(policy)},
        "infeasible": sum(row["infeasible"] for row in rows) / max(1, sum(row["measured"] for row in rows)),
        "infeasible_recommendations": sum(row["infeasible_recommendations"] for row in rows),
        "measured": statistics.fmean(row["measured"] for row in rows),
        "loads": statistics.fmean(row["loads"] for row in rows),
        "cost": statistics.fmean(row["cost"] for row in rows),
        "own_s": statistics.fmean(row["own_s"] for row in rows),
    }


def bars(rows: list[dict[str, Any]], shares: tuple[float, ...], budgets: list[int]) -> dict[str, bool]:
    """Which of the claims hold; those about scores must hold under each budget on its own."""
    ours = [row for row in rows if row["method"] == SEARCH]
    within = [share for share in shares if share <= WITHIN]
    last = [row for row in ours if within and row["share"] == max(within)]
    held = {"never an infeasible recommendation": not any(row["infeasible_recommendations"] for row in ours)}
    measured = max(1, sum(row["measured"] for row in ours))
    name = f"at most {INFEASIBLE:.0%} of measurements infeasible"
    held[name] = sum(row["infeasible"] for row in ours) <= INFEASIBLE * measured
    for label, figure, bar in (("median", "median", MEDIAN), ("10th percentile", "p10", LOW)):
        each = [summary([r for r in last if r["budget_bytes"] == budget])["contexts"] for budget in budgets if last]
        worst = min((at[figure] for contexts in each for at in contexts.values()), default=0.0)
        share = max(within, default=0)
        held[f"{label} at least {bar:.0%} in every context and budget with {share:.0%} of the cost"] = worst >= bar
    for share in shares:
        means: dict[str, float] = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            means[method] = statistics.fmean(r["policy"] for r in rows if (r["method"], r["share"]) == (method, share))
        others = [mean for method, mean in means.items() if method not in (SEARCH, WARM)]
        if SEARCH in means and others:
            held[f"better on average than every other method with {share:.0%}"] = means[SEARCH] > max(others)
    return held


def table(rows: list[dict[str, Any]], contexts: list[int], shares: tuple[float, ...]) -> Iterator[str]:
    heads = "".join(f"{f'at {context}':>16}" for context in contexts)
    tail = "".join(f"{word:>{width}}" for word, width in (("policy", 16), ("over budget", 13), ("wrong", 7)))
    yield f"{'cost':<6}{'method':<15}{heads}{tail}{'runs':>7}{'loads':>7}{'spent':>7}"
    for share in shares:
        for method in dict.fromkeys(row["method"] for row in rows):
            figures = summary([row for row in rows if (row["method"], row["share"]) == (method, share)])
            scores = [figures["contexts"].get(str(context)) for context in contexts] + [figures["policy"]]
            cells = "".join(f"{at['median']:>8.1%} {at['p10']:>7.1%}" if at else f"{'-':>16}" for at in scores)
            yield (
                f"{share:<6.0%}{method:<15}{cells}{figures['infeasible']:>13.1%}"
                f"{figures['infeasible_recommendations']:>7}{figures['measured']:>7.0f}{figures['loads']:>7.1f}"
                f"{figures['cost']:>7.1%}"
            )


@click.command()
@click.argument("path", metavar="SWEEP", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--budgets", help="sizes like 6.5GB,8GB; else quartiles of the footprints, and what barely fits")
@click.option("--shares", default=",".join(map(str, SHARES)), show_default=True, help="of the exhaustive cost")
@click.option("--seeds", default=20, show_default=True)
@click.option("--methods", default=",".join([SEARCH, *BASELINES]), show_default=True)
@click.option("--jobs", default=1, show_default=True, help="processes, a core each")
def main(path: Path, budgets: str | None, shares: str, seeds: int, methods: str, jobs: int) -> None:
    """The search beside other methods on a recorded sweep; the last line is one JSON object.

    Example: python -m benchmarks.search_regret sweep.jsonl.gz --seeds 5
    """
    sweep = read_sweep(path)
    sizes = [parse_bytes(word) for word in budgets.split(",")] if budgets else sweep.budgets()
    steps = tuple(sorted(float(word) for word in shares.split(",")))
    asked = methods.split(",")
    unknown = [word for word in asked if word not in (SEARCH, WARM, *BASELINES)]
    if unknown:
        raise click.UsageError(f"--methods {unknown[0]}: they are {', '.join([SEARCH, WARM, *BASELINES])}")
    if "GP" in asked and importlib.util.find_spec("scipy") is None:
        click.echo("GP is left out: its sampler needs scipy, which is not installed")
        asked.remove("GP")
    contexts = list(sweep.workload.contexts)
    header = sweep.header
    for size in sizes:
        if not sweep.optimum(size):
            raise click.UsageError(f"--budgets {mib(size)}: nothing in the sweep fits")
    click.echo(
        f"{header['environment']['device']}, {header['space_name']}: the sweep holds {len(sweep.configurations)} of "
        f"{header['legal']} configurations at {len(contexts)} contexts; measuring them took {sweep.cost_s:.0f} s"
    )
    if len(sweep.configurations) < header["legal"]:
        click.echo("suggestions that it does not hold stand for the nearest one held, for every method")
    if header["note"]:
        click.echo(header["note"])
    for size in sizes:
        best = ", ".join(f"{rate:.1f} at {context}" for context, rate in sorted(sweep.optimum(size).items()))
        click.echo(f"budget {mib(size)}: {len(sweep.feasible(size))} of {len(sweep.lines)} pairs fit; best {best}")
    tasks = [(method, size, seed) for method in asked for size in sizes for seed in range(seeds)]
    work = partial(replayed, path, steps)
    rows: list[dict[str, Any]] = []
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process that is spawned
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, found in enumerate(pool.map(work, tasks) if jobs > 1 else map(work, tasks), 1):
            rows += found
            click.echo(f"{number}/{len(tasks)} {found[0]['method']} {found[-1]['own_s']:.1f} s", err=True)
    click.echo("true rate over the optimum's: median and 10th percentile, over seeds and budgets")
    for line in table(rows, contexts, steps):
        click.echo(line)
    held = bars(rows, steps, sizes)
    for claim, holds in held.items():
        click.echo(f"{'held  ' if holds else 'MISSED'} {claim}")
    summaries = [
        {
            "method": method,
            "share": share,
            "budget_bytes": size,
            **summary([r for r in rows if (r["method"], r["share"], r["budget_bytes"]) == (method, share, size)]),
        }
        for share in steps
        for size in sizes
        for method in asked
    ]
    line = {"benchmark": "search_regret", "device": header["environment"]["device"], "note": header["note"]}
    line |= {"space": header["space_name"], "legal": header["legal"], "held": len(sweep.configurations)}
    line |= {"exhaustive_s": round(sweep.cost_s, 1), "seeds": seeds, "holds": held, "rows": summaries}
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
