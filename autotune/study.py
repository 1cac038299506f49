"""The search: which configuration to measure next, at which context. The only file that talks to Optuna's study API.

There is a study per context, with two objectives (rate up, perplexity down) and measured constraints (footprint,
quality); a study keeps what was measured, and what to try is enqueued to it. Every (configuration, context) that is not
known is weighed by what `surrogate` believes of its rate, its footprint and its soundness: the gain that it can be
expected to bring to the policy, a load group at every context, times the probability that it is feasible, over the
seconds that a look takes, its part of the load included. The load group that promises most is first measured at every
context that it can serve. A space too large to be weighed whole is weighed in a sample that grows around the best.
What was measured is measured again only where its error leaves the choice open: then a second look is weighed like a
first one, by what it may change. How to measure is handed in: `measure(configuration, context, stage)`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from .config import Budget, Configuration, LoadGroup, Record, Workload, median_error
from .earlier import Earlier
from .measure.throughput import pooled
from .results import RECORD, RunError, open_storage
from .space import Space
from .surrogate import Pool, below, footprint_belief, improvement, rate_belief, sound_belief

Measure = Callable[[Configuration, int, str], Record]
Fits = Callable[[Configuration, int], str]  # why the plan says that it cannot fit, or nothing

_LOADING = "while loading"  # how the reason of a record starts whose load group could not be loaded
_TRIES = 3  # winners elsewhere that are tried at a context before the load group is left without a record there
_FINISHED = 10  # trials of a context from which importances are told
_TOO_LARGE = ("over_budget", "out_of_memory")
COMPARABLE = ("ok", "quality_loss", "unstable")  # of a baseline, which need not be recommendable to be compared with
_POOL = 4000  # configurations up to which a space is weighed whole
_DRAWN = 1000  # configurations of a larger one that are drawn at a time
_CENTRES = 2  # of the fastest at a context whose neighbours are weighed as well
_UNLIKE = 0.08  # ln(rate) that each knob which experience would set otherwise is expected to cost
_LATER = 0.05  # ln(rate) by which weights are expected to be slower than those that the space names before them
_BOUND = 0.35  # of ln(bytes that a decode step reads) is expected to be lost in ln(rate)
_SOUND = 0.9  # of the configurations, before any is known
_UNCOVERED = 2.0  # ln(rate) below the worst, which a context that a load group does not serve counts as
_POSSIBLE = 0.1  # probability of being feasible below which a load group does not hope to serve a context
_RISK = 0.1  # of the looks may go over the budget
_CREDIT = 0.5  # of one that does, to begin with
_SURE = 0.9  # and above which one is begun with
_LIKELY = 0.5  # probability of being feasible below which nothing is hoped for from what else a look tells
_EARLIER = {True: 0.1, False: 0.2}  # by which ln(rate) of an earlier run may be off; for another model: more
_SHIFT = 0.5  # by which all of it may be
_NEAR = 0.5  # octaves between its context and one of this run's
_ONE_ROUND = 0.1  # standard error of a single round's ln(rate)
_LOOKS = 3  # at the same pair, the most; the finals look at what is chosen again
_DOUBT = 0.0003  # of the policy's ln(rate), the least for which something is looked at again
_OUTCOMES = 15  # of a look, which stand for what it may say
_SHARED = 2.0  # of a load, in looks at every context, is laid on the look that begins it


class Studies:
    """The storage of one run: a study per context, and one for records outside the search."""

    def __init__(self, url: str, name: str, identity: dict[str, Any], contexts: Iterable[int], seed: int):
        """Opens or creates them. Raises RunError for a storage that belongs to another model or workload."""
        self.storage, self.name = open_storage(url), name
        self.extra = self._open("records", seed)
        stored = self.extra.user_attrs.get("identity")
        summaries = optuna.get_all_study_summaries(self.storage, include_best_trial=False)
        if stored is None or not any(s.n_trials for s in summaries if s.study_name.startswith(f"{name}/")):
            self.extra.set_user_attr("identity", identity)
        elif stored != identity:
            differing = [key for key in identity if stored.get(key) != identity[key]]
            raise RunError(
                f"the storage already holds a run with another {', '.join(differing)}: "
                "give this one a folder of its own with --out, or repeat the first command to continue it"
            )
        self.by_context = {context: self._open(str(context), seed + context) for context in contexts}

    def _open(self, suffix: str, seed: int) -> optuna.Study:
        study = optuna.create_study(
            storage=self.storage,
            study_name=f"{self.name}/{suffix}",
            sampler=optuna.samplers.RandomSampler(seed=seed),  # never asked: what to try is enqueued
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        unfinished = (TrialState.RUNNING, TrialState.WAITING)
        for trial in study.get_trials(deepcopy=False, states=unfinished):  # a run that was killed
            self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        return study

    def keep(self, record: Record) -> None:
        """Store a record that is no answer to a suggestion: a finalist measured again, a length between contexts."""
        trial = self.extra.ask()
        trial.set_user_attr(RECORD, json.dumps(record.to_json()))
        self.extra.tell(trial, state=TrialState.PRUNED)

    def ask(self, context: int, fixed: dict[str, Any] | None = None) -> optuna.Trial:
        study = self.by_context[context]
        if fixed is not None:
            study.enqueue_trial(fixed)
        return study.ask()

    def tell(self, context: int, trial: optuna.Trial, record: Record, workload: Workload, budget: Budget) -> None:
        """What a suggestion led to. The record is stored before the sampler hears of it."""
        trial.set_user_attr("outcome", record.outcome)
        if record.peak_bytes is not None:
            trial.set_constraint("footprint", record.peak_bytes / budget.bytes - 1)
        ratio = record.perplexity_ratio
        if ratio is not None and not math.isfinite(ratio):
            ratio = None  # Optuna takes no NaN; the outcome's constraint is violated all the same
        if ratio is not None:
            trial.set_constraint("quality", ratio - 1 - workload.max_quality_loss)
        trial.set_constraint("outcome", 0.0 if record.outcome == "ok" else 1.0)
        study = self.by_context[context]
        if record.tokens_per_s is None or ratio is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [record.rate(workload.objective), ratio])


def joined(before: Record | None, record: Record) -> Record:
    """What is known of a pair after one more look: both as one where both were sound, else the later."""
    if before is not None and before.outcome == record.outcome == "ok" and before.samples and record.samples:
        return pooled(before, record)
    return record


@dataclass
class Search:
    """One run's search, over all its contexts."""

    space: Space
    workload: Workload
    budget: Budget
    studies: Studies
    measure: Measure
    fits: Fits
    deadline: float  # as `now` has it
    max_trials: int | None = None
    seed: int = 0
    first: tuple[Configuration, ...] = ()  # what experience says may win
    known: dict[tuple[Configuration, int], Record] = field(default_factory=dict)
    again: list[Record] = field(default_factory=list)  # second looks, which `known` has with the first ones
    earlier: tuple[Earlier, ...] = ()  # runs to learn from
    predicted: Callable[[Configuration, int], int] | None = None  # the footprint, uncalibrated, in bytes
    step_bytes: Callable[[Configuration, int], float] | None = None  # read by a decode step, where that sets its pace
    on_record: Callable[[Record], None] = lambda record: None
    now: Callable[[], float] = lambda: time.monotonic()

    def run(self) -> None:
        """Measure until time, trials or the space run out.

        A load group that comes to lead is looked at with its draft model idle as well, at every context: that takes no
        load, and what a draft is worth there is seldom known from elsewhere.
        """
        for opening in self._opening():
            if not self._over() and self._outlook.chance(*opening) >= _SURE and opening not in self.known:
                self._measured(*opening, "search")
        weighed: set[LoadGroup] = set()
        while not self._over():
            pair, leader = self._next(), self._outlook.leader
            if leader is not None and leader not in weighed:
                weighed.add(leader)
                for configuration, context in idle(self, leader):
                    if not self._over():
                        also(self, configuration, context)
            elif pair is None:
                return
            else:
                self._measured(*pair, "search")

    def _opening(self) -> list[tuple[Configuration, int]]:
        """What experience favours of what the baseline has loaded, at every context.

        It takes no load, every run begins with it, and it tells what the knobs beside the load are worth here.
        """
        groups = [c.load_group for (c, _), record in self.known.items() if record.stage == "baseline"]
        favoured = [c for c in self.first if groups and c.load_group == groups[-1]]
        return [(c, context) for c in favoured[:1] for context in self.workload.contexts]

    def baseline(self, candidates: list[Configuration], sure: float = 0.0) -> None:
        """Measure, per context, the first candidate that fits: what a user would run without tuning.

        What fits with a lesser probability than `sure` is left for when more is known.
        """
        for candidate in candidates:
            for context in self.workload.contexts:
                if (candidate, context) in self.known or self.baseline_of(context, candidates) is not None:
                    continue
                if not self.too_large(candidate, context) and self._outlook.chance(candidate, context) >= sure:
                    self._measured(candidate, context, "baseline")

    def baseline_of(self, context: int, candidates: list[Configuration]) -> Record | None:
        for candidate in candidates:
            record = self.known.get((candidate, context))
            if record is not None and record.outcome in COMPARABLE:
                return record
        return None

    def _over(self) -> bool:
        measured = sum(record.stage == "search" for record in [*self.known.values(), *self.again])
        return self.now() >= self.deadline or (self.max_trials is not None and measured >= self.max_trials)

    @cached_property
    def _outlook(self) -> Outlook:
        return Outlook(self)

    @property
    def open(self) -> float | None:
        """The share of the possible gain that was open when the last pair was chosen; None while nobody knows."""
        return self._outlook.open

    def _next(self) -> tuple[Configuration, int] | None:
        """The pair with the most to expect of the time that it takes, or None if none is left."""
        return self._outlook.best()

    def hopeless(self, configuration: Configuration, context: int) -> str:
        """Why measuring it cannot change the answer: what is known of the same load or the same text, or the plan."""
        return self.ruled_out(configuration, context) or self.fits(configuration, context)

    def ruled_out(self, configuration: Configuration, context: int) -> str:
        """The same by what was measured alone, which stays."""
        same = configuration.at(context)
        for (other, at), record in self.known.items():
            if _did_not_load(record) and other.load_group == configuration.load_group:
                return record.reason
            if at == context and other != configuration and other.at(at) == same:
                return f"at {at} tokens the same as {other.differs_from(configuration)}"
            if at != context or record.outcome != "quality_loss" or other.quality_key != configuration.quality_key:
                continue
            if other != configuration:
                return record.reason
        return self._outgrown(configuration, context)

    def too_large(self, configuration: Configuration, context: int) -> str:
        """Why it cannot fit: what needs no more did not, or the plan says so."""
        return self._outgrown(configuration, context) or self.fits(configuration, context)

    def _outgrown(self, configuration: Configuration, context: int) -> str:
        """Which record of what needs no more did not fit.

        What did not fit is a lower bound. It needs no more than the same configuration at a longer context, which holds
        all that a shorter one does, and no more than one with the same words that the plan puts at as much or more.
        """
        for (other, at), record in self.known.items():
            if at > context or record.outcome not in _TOO_LARGE or _held(other) != _held(configuration):
                continue
            if other == configuration and at < context:
                return f"at {at} tokens: {record.reason}"
            if other == configuration or self.predicted is None:
                continue
            if self.predicted(configuration, context) >= self.predicted(other, at):
                return f"at {at} tokens, with what needs no more: {record.reason}"
        return ""

    def _measured(self, configuration: Configuration, context: int, stage: str) -> Record:
        trial = None
        if stage != "boundary":
            parameters = self.space.parameters(configuration)
            if parameters is not None:
                trial = self.studies.ask(context, parameters)
                self.space.suggest(trial)
        record = self.measure(configuration, context, stage)
        self.learn(record)
        if trial is None:
            self.studies.keep(record)
        else:
            trial.set_user_attr(RECORD, json.dumps(record.to_json()))
            self.studies.tell(context, trial, record, self.workload, self.budget)
        self.on_record(record)
        return record

    def learn(self, record: Record) -> None:
        """Know a record; with what was known of the same pair, where that was looked at before."""
        pair = record.configuration, record.context_tokens
        self.known[pair] = joined(self.known.get(pair), record)
        if self.known[pair] is not record:
            self.again.append(record)

    def measured(
        self, configuration: Configuration, context: int, stage: str = "search", again: bool = False
    ) -> Record:
        """The record of a configuration at a context, measured now if it is not known or is asked for again."""
        known = self.known.get((configuration, context))
        return known if known is not None and not again else self._measured(configuration, context, stage)


class Outlook:
    """What the search expects of the pairs that it may measure, from those that it knows."""

    def __init__(self, search: Search):
        self.search = search
        self.contexts = list(search.workload.contexts)
        self.random = random.Random(search.seed)
        self.pool = Pool(self.contexts)
        self.rate, self.footprint, self.sound = rate_belief(), footprint_belief(), sound_belief()
        self.groups: dict[LoadGroup, int] = {}
        self.learnt: set[tuple[Configuration, int]] = set()
        self.resident: LoadGroup | None = None
        self.centres: set[Configuration] = set()
        self.worth: Any = np.zeros(0)  # per pair: the gain in the policy's ln(rate) that a look may bring
        self.standing: dict[int, float] = {}  # ln(rate) of the leading load group
        self.open: float | None = None
        self.relearnt = 0  # second looks
        self.doubtful: Any = np.zeros(0, bool)  # known, and worth a second look
        self.leader: LoadGroup | None = None  # the leading load group, once it is measured wherever it can serve
        self.room: Any = np.zeros(0)  # per pair: ln(budget / predicted)
        self.out: Any = np.zeros(0, bool)  # known, or ruled out by what is
        self.doubted: Any = np.zeros(0, bool)  # predicted, as far as is known, not to fit
        whole = list(islice(search.space.configurations(), _POOL + 1))
        self.whole = len(whole) <= _POOL
        self._extend(whole if self.whole else [*search.first, *self._drawn(_DRAWN)])
        if search.earlier:
            self._inform()

    def _inform(self) -> None:
        """Expect what earlier runs measured, each at the nearest of this run's contexts."""
        search = self.search
        self._extend(record.configuration for run in search.earlier for record in run.records)
        rates: list[list[tuple[int, float, float]]] = []
        peaks: list[tuple[int, float, float]] = []
        sound: list[tuple[int, float, float]] = []
        for run in search.earlier:
            rates.append([])
            for record in run.records:
                context = min(self.contexts, key=lambda c: abs(math.log2(c / record.context_tokens)))
                if abs(math.log2(context / record.context_tokens)) > _NEAR:
                    continue
                at = self.pool.index[record.configuration, context]
                if record.tokens_per_s and record.ttft_s and record.decode_tokens_per_s:
                    off = math.hypot(_EARLIER[run.same], record.spread or 0.0)
                    rates[-1].append((at, math.log(record.rate(search.workload.objective)), off))
                if run.same and record.peak_bytes and search.predicted is not None:
                    said = search.predicted(record.configuration, record.context_tokens)
                    peaks.append((at, math.log(record.peak_bytes / said), 0.01))
                if run.same and record.outcome in ("ok", "over_budget", "quality_loss", "unsupported"):
                    sound.append((at, float(record.outcome in ("ok", "over_budget")), 0.3))
        self.rate.inform(rates, _SHIFT)
        self.footprint.inform([peaks], 0.0)
        self.sound.inform([sound], 0.0)

    def _drawn(self, count: int) -> list[Configuration]:
        return [self.search.space.suggest(Drawn(self.random)) for _ in range(count)]

    def _extend(self, configurations: Iterable[Configuration]) -> None:
        """Take configurations into the pool, with a draft model also idle; all that was learnt is learnt again."""
        search, before = self.search, len(self.pool.pairs)
        self.pool.extend(with_idle(configurations))
        pairs = self.pool.pairs
        if len(pairs) == before:
            return
        grown = len(pairs) - before
        self.context = np.array([self.contexts.index(context) for _, context in pairs])
        self.group = np.array([self.groups.setdefault(c.load_group, len(self.groups)) for c, _ in pairs])
        room = [0.0] * grown
        if search.predicted is not None:
            room = [math.log(search.budget.bytes / search.predicted(*pair)) for pair in pairs[before:]]
        self.room = np.concatenate([self.room, room])
        self.out = np.concatenate([self.out, np.zeros(grown, bool)])
        self.doubted = np.concatenate([self.doubted, np.zeros(grown, bool)])
        self.doubtful = np.concatenate([self.doubtful, np.zeros(grown, bool)])
        mean = -_UNLIKE * self.pool.distance(search.first)
        if search.step_bytes is not None:
            order = {word: rank for rank, word in enumerate(search.space.choices["weights"])}
            mean -= _LATER * np.array([order.get(c.weights, len(order)) for c, _ in pairs])
            mean -= _BOUND * np.log([search.step_bytes(*pair) for pair in pairs])
        self.rate.reset(self.pool, mean)
        self.footprint.reset(self.pool, np.zeros(len(pairs)))
        self.sound.reset(self.pool, np.full(len(pairs), _SOUND))

    def _learn(self) -> None:
        """From every record that came since the last time."""
        search = self.search
        new = [pair for pair in search.known if pair not in self.learnt and pair[1] in self.contexts]
        self._extend(configuration for configuration, _ in new)
        for pair in new:
            self.learnt.add(pair)
            record, at = search.known[pair], self.pool.index[pair]
            self.out[at] = True
            if record.tokens_per_s is not None:
                rate = max(record.rate(search.workload.objective), 1e-9)
                self.rate.observe(at, math.log(rate), self._error(record))
                self.sound.observe(at, float(record.outcome in ("ok", "over_budget", "unstable")))
            elif record.outcome in ("unsupported", "crashed"):
                self.sound.observe(at, 0.0)
            if search.predicted is not None and record.peak_bytes:
                self.footprint.observe(at, math.log(record.peak_bytes / search.predicted(*pair)))
            elif search.predicted is not None and record.outcome == "out_of_memory":
                self.footprint.exceed(at, self.room[at])
            if _did_not_load(record):
                self.out |= self.group == self.group[at]
            self.resident = None if record.reason.startswith(_LOADING) else record.configuration.load_group
        for record in search.again[self.relearnt :]:
            pair = record.configuration, record.context_tokens
            if pair in self.learnt:
                rate = math.log(record.rate(search.workload.objective))
                self.rate.observe(self.pool.index[pair], rate, self._error(record))
                self.resident = record.configuration.load_group
        self.relearnt = len(search.again)
        if new:
            self.doubted[:] = False

    def _error(self, record: Record) -> float:
        """The standard error of its ln(rate): that of a median over its rounds."""
        rates = record.round_rates(self.search.workload.objective)
        return median_error([math.log(rate) for rate in rates]) if len(rates) > 1 else _ONE_ROUND

    def chance(self, configuration: Configuration, context: int) -> float:
        """The probability that it fits."""
        self._learn()
        self._extend([configuration])
        return float(self._chances()[self.pool.index[configuration, context]])

    def _chances(self) -> Any:
        if self.search.predicted is None:
            return np.ones(len(self.pool.pairs))
        return below((self.room - self.footprint.mean) / self.footprint.deviation)

    def best(self) -> tuple[Configuration, int] | None:
        self._learn()
        if not self.whole:
            self._explore()
        while True:
            closed = self.out | self.doubted
            scores, least = self._scores(), self._least(closed)
            self.open = self._open(closed)
            scores[(closed | (self._chances() < least)) & ~self.doubtful] = -np.inf
            before = int(closed.sum())
            while scores[at := int(np.argmax(scores))] > -np.inf:
                scores[at] = -np.inf
                if self.doubtful[at]:
                    return self.pool.pairs[at]
                if self.search.ruled_out(*self.pool.pairs[at]):
                    self.out[at] = True
                elif self.search.fits(*self.pool.pairs[at]):
                    self.doubted[at] = True
                else:
                    return self.pool.pairs[at]
            ended = least == math.inf or self.whole
            if (self.out | self.doubted).sum() == before and (ended or not self._more()):
                return None

    def _open(self, closed: Any) -> float | None:
        """The share of the possible gain that is still open, 0 to 1; None before a load group is measured throughout.

        Open is what one more look at each context is expected to add to the policy's ln(rate); the possible gain is
        that and what the leading load group has gained over the baselines, or over what was measured first instead.
        """
        search = self.search
        if self.leader is None or not len(self.worth):
            return None
        worth = np.where(closed, 0.0, self.worth)
        more = sum(float(worth[self.context == c].max(initial=0.0)) for c in range(len(self.contexts)))
        began: dict[int, float] = {}
        rated = [(at, r) for (_, at), r in search.known.items() if at in self.contexts and r.tokens_per_s is not None]
        for context, record in sorted(rated, key=lambda item: item[1].stage != "baseline"):
            began.setdefault(context, math.log(max(record.rate(search.workload.objective), 1e-9)))
        gains = [top - began[context] for context, top in self.standing.items() if top > -np.inf]
        made = max(float(sum(gains)) / len(self.contexts), 0.0)
        return more / (more + made) if more > 0 else 0.0

    def _least(self, closed: Any) -> float:
        """The least probability of fitting that a look must have, so that about a tenth of all go over the budget.

        Each look allows for a tenth of one that does not fit, and begins with one whole. Where no pair is as sure as
        that, the surest are looked at, unless every context is served and even they are not likely to fit.
        """
        search, open_ = self.search, self._chances()[~closed]
        if search.predicted is None or not len(open_):
            return 0.0
        over = sum(record.outcome in _TOO_LARGE for record in search.known.values())
        least = min(over + 1 - _RISK * (len(search.known) + 1) - _CREDIT, 1 - _RISK)
        surest = float(open_.max())
        return math.inf if self.leader is not None and surest < min(least, _LIKELY) else min(least, surest)

    def _explore(self) -> None:
        """Bring what differs in one knob from the best of each context into the pool."""
        search = self.search
        for context in self.contexts:
            sound = [r for (_, at), r in search.known.items() if at == context and r.outcome == "ok"]
            for record in sorted(sound, key=lambda r: -r.rate(search.workload.objective))[:_CENTRES]:
                if record.configuration not in self.centres:
                    self.centres.add(record.configuration)
                    self._extend(search.space.neighbours(record.configuration))

    def _more(self) -> bool:
        before = len(self.pool.pairs)
        self._extend(self._drawn(_DRAWN))
        return len(self.pool.pairs) > before

    def _scores(self) -> Any:
        """Per pair: the expected gain of the policy's ln(rate) over the seconds that it takes to look."""
        search, count = self.search, len(self.contexts)
        mean, deviation = self.rate.mean, self.rate.deviation
        chance = self._chances() * np.clip(self.sound.mean, 0.02, 1.0)
        standing = np.full((len(self.groups), count), -np.inf)
        for (configuration, context), record in search.known.items():
            if record.outcome == "ok" and context in self.contexts:
                cell = self.groups[configuration.load_group], self.contexts.index(context)
                standing[cell] = max(standing[cell], math.log(record.rate(search.workload.objective)))
        held = standing > -np.inf
        self.doubtful[:] = False
        look, load = self._times()
        seconds = look[self.context] + load[self.group] * _SHARED / count
        if not held.any():  # nothing to compare with: what experience has, where it fits for sure
            return mean + 0.5 * np.log(np.maximum(chance, 1e-9)) - 0.01 * seconds / seconds.min()
        open_ = ~(self.out | self.doubted)
        promise = np.where(open_, mean + 0.5 * deviation + np.log(np.maximum(chance, 1e-9)), -np.inf)
        top = np.full((len(self.groups), count), -1)
        order = np.argsort(promise, kind="stable")
        top[self.group[order], self.context[order]] = order
        usable = (top >= 0) & (promise[top] > -np.inf) & (chance[top] >= _POSSIBLE) & ~held
        sure = np.where(usable, chance[top], 0.0)
        floor = mean.min() - _UNCOVERED
        middle = np.where(held, standing, sure * mean[top] + (1 - sure) * floor)
        whole = held.any(axis=1) & ~usable.any(axis=1)  # measured wherever it can serve
        leader = int(np.where(whole if whole.any() else True, middle.sum(axis=1), -np.inf).argmax())
        missing = np.flatnonzero(usable[leader])
        self.leader = None if len(missing) else list(self.groups)[leader]
        self.worth = np.zeros(0)
        if len(missing):  # a policy needs all of its contexts: what may fail first, else what is looked at soonest
            at = top[leader, min(missing, key=lambda c: (round(sure[leader, c], 1), seconds[top[leader, c]]))]
            return np.where(np.arange(len(mean)) == at, 1.0, np.where(open_, 1e-3 * promise - seconds, -np.inf))
        # what it is worth if all of the group's contexts fit, times the probability that they do
        hope = np.where(held, standing, np.where(usable, mean[top], floor))
        after, weight = self._after(hope, np.where(usable, top, -1), open_ & (chance >= _LIKELY))
        leads = middle[leader].mean()
        gain = np.maximum(after - leads, 0.0) @ weight
        here, lacking = held[self.group, self.context], usable.any(axis=1)[self.group]
        # what is hoped for where the group was not measured is no merit of another look where it was
        gain -= np.where(here & lacking, np.maximum(hope.mean(axis=1) - leads, 0.0)[self.group], 0.0)
        needed = np.where(usable, chance[top], 1.0)
        others = np.stack([np.delete(needed, c, axis=1).min(axis=1, initial=1.0) for c in range(count)], axis=1)
        self.worth = np.minimum(chance, others[self.group, self.context]) * np.maximum(gain, 0.0)
        self.standing = dict(zip(self.contexts, standing[leader], strict=True))
        # where its group was not measured a look is a beginning: with what is likely to follow until it can be chosen
        missed = usable * look  # seconds, of what each group lacks
        follow = missed.sum(axis=1)[self.group] - missed[self.group, self.context]
        scores = self.worth / (seconds + np.where(here, 0.0, follow * ((after > leads) @ weight)))
        doubts = self._doubts(standing, middle.mean(axis=1), leader)
        # it takes all of a group to change the policy: what no time is left for comes last
        ahead = load[self.group] + missed.sum(axis=1)[self.group] + here * look[self.context]
        scores[lacking & (ahead > search.deadline - search.now())] *= 0.01
        scores[~here & (top[self.group, self.context] != np.arange(len(mean)))] = 0.0
        if scores[open_].max(initial=0.0) < 1e-12:
            scores = np.where(open_, 1e-3 * promise - seconds, -np.inf)  # what is cheapest to be sure of
        for at, worth in doubts.items():
            self.doubtful[at], scores[at] = True, worth / seconds[at]
        return scores

    def _after(self, hope: Any, top: Any, fits: Any) -> tuple[Any, Any]:
        """The ln(rate) of a policy with each pair's group once that is looked at (pairs x outcomes), and their weights.

        A look tells of the same configuration at other contexts as well, and of the pairs that would be measured where
        the group was not yet (`top`; -1 where it was), as far as they go together: the knowledge gradient for
        correlated beliefs (Frazier, Powell and Dayanik, 2009). `hope` is what the group has or is expected to have.
        """
        mean, pairs, count = self.rate.mean, np.arange(len(self.group)), len(self.contexts)
        told = np.hypot(self.rate.deviation, _ONE_ROUND / math.sqrt(2))  # by which two rounds may differ from the mean
        outcome, weight = np.polynomial.hermite_e.hermegauss(_OUTCOMES)
        after = np.zeros((len(pairs), _OUTCOMES))
        expected = hope.copy()  # of what is not known yet, too
        np.maximum.at(expected, (self.group[fits], self.context[fits]), mean[fits])
        for context in range(count):
            best, same = top[self.group, context], pairs // count * count + context  # as the pool has them
            slope = np.where(best >= 0, self.rate.between(np.maximum(best, 0), pairs), 0.0) / told
            reached = hope[self.group, context][:, None] + slope[:, None] * outcome
            also = mean[same][:, None] + (self.rate.between(same, pairs) / told)[:, None] * outcome
            # there it is measured; elsewhere it counts by how much more is expected than was
            least = np.where((best < 0) & (self.context != context), expected[self.group, context], reached.T).T
            after += (reached + np.where(fits[same][:, None], np.maximum(also - least, 0.0), 0.0)) / count
        return after, weight / weight.sum()

    def _doubts(self, standing: Any, means: Any, leader: int) -> dict[int, float]:
        """What a second look is worth, by pair: how likely it is to change the choice, and by how much.

        The choice is between load groups, and within the leading one at each context. A look at what leads can only
        lower it to what comes next; one at what does not can raise it over what leads.
        """
        search, count, found = self.search, len(self.contexts), {}
        whole = (standing > -np.inf).all(axis=1)
        others = np.where(whole & (np.arange(len(means)) != leader), means, -np.inf)
        looks = Counter((record.configuration, record.context_tokens) for record in search.again)
        cells: dict[tuple[int, int], list[tuple[float, int, Record]]] = {}
        for (configuration, context), record in search.known.items():
            if record.outcome == "ok" and record.samples and context in self.contexts:
                cell = self.groups[configuration.load_group], self.contexts.index(context)
                rate = math.log(record.rate(search.workload.objective))
                cells.setdefault(cell, []).append((rate, self.pool.index[configuration, context], record))
        for (group, context), here in cells.items():
            _, second = [*sorted((rate for rate, *_ in here), reverse=True), -np.inf][:2]
            for rate, at, record in here:
                behind = (rate - standing[group, context]) / count
                if group != leader:
                    gain = means[group] - means[leader] + behind if whole[group] else -np.inf
                elif behind < 0:
                    gain = behind
                else:
                    gain = max(float(others.max()) - means[leader], (second - rate) / count)
                looked = 1 + looks[self.pool.pairs[at]]
                if gain > -1 and looked < _LOOKS:
                    worth = float(improvement(gain, self._error(record) / math.sqrt(1 + looked) / count))
                    if worth >= _DOUBT:
                        found[at] = worth
        return found

    def _times(self) -> tuple[Any, Any]:
        """Seconds that a look takes at each context, and that loading each group takes: none where it is resident."""
        search, count = self.search, len(self.contexts)
        looks: list[list[float]] = [[] for _ in range(count)]
        loads: dict[tuple[str, bool], list[float]] = {}
        for (configuration, context), record in search.known.items():
            if record.tokens_per_s is not None and context in self.contexts:
                looks[self.contexts.index(context)].append(record.measure_s or 0.0)
            if record.load_s:
                loads.setdefault((configuration.weights, configuration.has_draft_model), []).append(record.load_s)
        means = [statistics.fmean(values) if values else None for values in looks]
        longest = max((value for value in means if value is not None), default=1.0)
        look = np.maximum([longest if value is None else value for value in means], 1e-3)
        usual = statistics.fmean([value for values in loads.values() for value in values] or [2 * longest])
        load = np.zeros(len(self.groups))
        for group, number in self.groups.items():
            if group != self.resident:
                load[number] = statistics.fmean(loads.get((group.weights, group.draft != "none"), [usual]))
        return look, load


def with_idle(configurations: Iterable[Configuration]) -> Iterator[Configuration]:
    """Each of them, and with its draft model idle, where it has one."""
    for configuration in configurations:
        yield configuration
        if configuration.has_draft_model:
            yield configuration.replace(depth=0)


class Drawn:
    """Stands for an Optuna trial whose choices are drawn at random."""

    def __init__(self, draw: random.Random):
        self.draw = draw

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.draw.choice(choices)


def importances(url: str, name: str, contexts: Iterable[int]) -> dict[int, dict[str, float]]:
    """Per context each knob's share in what set the faster half of its finished trials apart, the largest first.

    PED-ANOVA for conditional spaces (arXiv:2304.10255, arXiv:2601.20800). A context with fewer than 10 finished trials,
    five in that half, is left out. What was told again from memory counts once.
    """
    storage, found = open_storage(url), {}
    known = optuna.get_all_study_names(storage)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=1 / 2)
    for context in contexts:
        if f"{name}/{context}" not in known:
            continue
        trials = optuna.load_study(study_name=f"{name}/{context}", storage=storage).trials
        study = optuna.create_study(directions=["maximize", "minimize"])
        study.add_trials([t for t in trials if t.state == TrialState.COMPLETE and RECORD in t.user_attrs])
        if len(study.trials) < _FINISHED:
            continue
        with warnings.catch_warnings():  # it warns that it looks for low values, and of rare branches of the space
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda t: -t.values[0])
        knobs: dict[str, float] = {}
        for parameter, share in shares.items():
            knob = parameter.partition(" of ")[0]  # a part of a knob's choices is a parameter of its own
            knobs[knob] = knobs.get(knob, 0.0) + share
        found[context] = dict(sorted(knobs.items(), key=lambda item: (-item[1], item[0])))
    return found


def _held(configuration: Configuration) -> tuple[str, ...]:
    """The words of what is held: only of configurations that share them can the plan say which needs more."""
    c = configuration
    return c.weights, c.lm_head, c.embeddings, c.cache, c.draft, c.draft_weights, c.launch


def _did_not_load(record: Record) -> bool:
    """Whether the load group itself failed; loading that took too long may have been the machine's doing."""
    return record.reason.startswith(_LOADING) and record.outcome != "timeout"


def complete(search: Search, group: LoadGroup) -> None:
    """Give a load group a record at every context, from the knobs that won elsewhere, its draft used and idle."""
    for context in search.workload.contexts:
        best = [record.configuration for record in _fastest(search, group)]
        for candidate in list(dict.fromkeys(best))[:_TRIES]:
            if also(search, candidate, context) == "ok":
                break
    for configuration, context in idle(search, group):
        also(search, configuration, context)


def idle(search: Search, group: LoadGroup) -> Iterator[tuple[Configuration, int]]:
    """What is fastest of a load group at each context, with its draft model idle."""
    for context in search.workload.contexts if group.draft != "none" else ():
        here = [record for record in _fastest(search, group) if record.context_tokens == context]
        if here:
            yield here[0].configuration.replace(depth=0), context


def _fastest(search: Search, group: LoadGroup) -> list[Record]:
    """The sound records of a load group, the fastest first."""
    sound = (r for r in search.known.values() if r.outcome == "ok" and r.configuration.load_group == group)
    return sorted(sound, key=lambda record: -record.rate(search.workload.objective))


def also(search: Search, configuration: Configuration, context: int) -> str:
    """The outcome of a configuration at a context, measured if there is time and it may fit; nothing if not."""
    known = (configuration, context) in search.known
    if not known and (search.now() >= search.deadline or search.too_large(configuration, context)):
        return ""
    return search.measured(configuration, context).outcome
