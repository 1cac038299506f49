"""The search, driven and stored. The only file that talks to Optuna's study API.

There is a study per context, with two objectives (rate up, perplexity down) and measured constraints (footprint,
quality); a study keeps what was measured, and what to try is enqueued to it. What to measure next, at which context,
`outlook` says. How to measure is handed in: `measure(configuration, context, stage)`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import TrialState

from ..config import Budget, Configuration, LoadGroup, Record, Workload
from ..results import RECORD, RunError, open_storage
from ..samples import pooled
from .earlier import Earlier
from .outlook import TOO_LARGE, Outlook, did_not_load
from .space import Space

Measure = Callable[[Configuration, int, str], Record]
Fits = Callable[[Configuration, int], str]  # why the plan says that it cannot fit, or nothing

_TRIES = 3  # winners elsewhere that are tried at a context before the load group is left without a record there
_FINISHED = 10  # trials of a context from which importances are told
COMPARABLE = ("ok", "quality_loss", "unstable")  # of a baseline, which need not be recommendable to be compared with
_SURE = 0.9  # probability of fitting above which a search begins with what experience favours


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
            if did_not_load(record) and other.load_group == configuration.load_group:
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
            if at > context or record.outcome not in TOO_LARGE or _held(other) != _held(configuration):
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
