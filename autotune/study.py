"""The search: which configuration to measure next. The only file that talks to Optuna's study API.

There is a study per context, with two objectives (rate up, perplexity down) and measured constraints (footprint,
quality). The baseline comes first. Then a study is asked for a configuration, and while that load group is resident
the other contexts' studies are asked for the knobs that need no reload, for at least as long as the load took. What was
measured once is told again from memory, never measured again. Failures without figures are told as PRUNED with a
violated constraint, because a sampler learns nothing from FAIL. How to measure is handed in:
`measure(configuration, context, stage)`.
"""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from .config import Budget, Configuration, LoadGroup, Record, Workload
from .results import RECORD, RunError, open_storage
from .space import Space

Measure = Callable[[Configuration, int, str], Record]
Fits = Callable[[Configuration, int], str]  # why the plan says that it cannot fit, or nothing

_DUPLICATES = 10  # suggestions in a row that were all known, after which one is drawn from what is left
_LOADING = "while loading"  # how the reason of a record starts whose load group could not be loaded
_TRIES = 3  # winners elsewhere that are tried at a context before the load group is left without a record there
_FINISHED = 10  # trials of a context from which importances are told
FIRST_SHARE = 0.4  # of the search's time goes at most to what experience says may win


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
        with warnings.catch_warnings():  # `group` is experimental, and what makes a joint model of a conditional space
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True, group=True, seed=seed)
        study = optuna.create_study(
            storage=self.storage,
            study_name=f"{self.name}/{suffix}",
            sampler=sampler,
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
    first: tuple[Configuration, ...] = ()  # measured before the sampler is asked
    known: dict[tuple[Configuration, int], Record] = field(default_factory=dict)
    skipped: int = 0
    on_record: Callable[[Record], None] = lambda record: None
    now: Callable[[], float] = lambda: time.monotonic()
    _asked: tuple[int, Configuration, optuna.Trial] | None = field(default=None, init=False, repr=False)

    def run(self) -> None:
        """Measure until time, trials or the space run out."""
        self._random = random.Random(self.seed)
        contexts = list(self.workload.contexts)
        began = self.now()
        share = FIRST_SHARE * (self.deadline - began)
        for configuration in self.first:
            if self.now() - began < share:
                self._sow(configuration)
        while contexts and not self._over():
            context = min(contexts, key=lambda c: sum(at == c for _, at in self.known))
            first = self._propose(context)
            if first is None:
                contexts.remove(context)
            else:
                self._stay(first, context)

    def baseline(self, candidates: list[Configuration]) -> None:
        """Measure, per context, the first candidate that fits: what a user would run without tuning."""
        for candidate in candidates:
            for context in self.workload.contexts:
                if (candidate, context) in self.known or self.baseline_of(context, candidates) is not None:
                    continue
                if not self.too_large(candidate, context):
                    self._measured(candidate, context, "baseline")

    def baseline_of(self, context: int, candidates: list[Configuration]) -> Record | None:
        for candidate in candidates:
            record = self.known.get((candidate, context))
            if record is not None and record.outcome in ("ok", "quality_loss", "unstable"):
                return record
        return None

    def _over(self) -> bool:
        measured = sum(record.stage == "search" for record in self.known.values())
        return self.now() >= self.deadline or (self.max_trials is not None and measured >= self.max_trials)

    def _sow(self, chosen: Configuration) -> None:
        """Measure what experience says may win, at every context where it may still."""
        for context in self.workload.contexts:
            if not self._over() and (chosen, context) not in self.known and not self.hopeless(chosen, context):
                self._measured(chosen, context, "search")

    def _stay(self, first: Configuration, at: int) -> None:
        """Measure the proposal, then more of its load group at every context, for at least as long as loading took."""
        spent, load_s = 0.0, 0.0
        proposal: Configuration | None = first
        contexts = [at, *(context for context in self.workload.contexts if context != at)]
        while True:
            found = False
            for context in contexts:
                if self._over():
                    return
                proposal = proposal or self._propose(context, first)
                if proposal is None:
                    continue
                found = True
                record = self._measured(proposal, context, "search")
                proposal = None
                if record.reason.startswith(_LOADING):
                    return
                spent, load_s = spent + (record.measure_s or 0), record.load_s or load_s
            if not found or spent >= load_s:
                return

    def _propose(self, context: int, like: Configuration | None = None) -> Configuration | None:
        """A configuration that is not known at this context (of the load group of `like`), or None if there is none."""
        fixed = None
        if like is not None:
            fixed = self.space.load_parameters(like)
            if self._draw(context, like) is None:  # asking costs more than looking: a trial is many writes
                return None
        for _ in range(_DUPLICATES):
            trial = self.studies.ask(context, fixed)
            configuration = self.space.suggest(trial)
            if like is not None and configuration.load_group != like.load_group:  # it asks for a draft model
                self.studies.by_context[context].tell(trial, state=TrialState.FAIL)  # no answer: nothing to learn
                continue
            reason = self.hopeless(configuration, context)
            record = self.known.get((configuration, context))
            if record is not None:
                self.studies.tell(context, trial, record, self.workload, self.budget)
            elif reason:
                self.skipped += 1
                trial.set_user_attr("skipped", reason)
                trial.set_constraint("plan", 1.0)
                self.studies.by_context[context].tell(trial, state=TrialState.PRUNED)
            else:
                self._asked = (context, configuration, trial)
                return configuration
        return self._draw(context, like)

    def _draw(self, context: int, like: Configuration | None) -> Configuration | None:
        """One of the configurations that are left, at random."""
        space = self.space if like is None else self.space.with_load_group(like)
        left = [configuration for configuration in space.configurations() if (configuration, context) not in self.known]
        self._random.shuffle(left)
        return next((configuration for configuration in left if not self.hopeless(configuration, context)), None)

    def hopeless(self, configuration: Configuration, context: int) -> str:
        """Why measuring it cannot change the answer: what is known of the same load or the same text, or the plan."""
        for (other, at), record in self.known.items():
            if _did_not_load(record) and other.load_group == configuration.load_group:
                return record.reason
            if at != context or record.outcome != "quality_loss" or other.quality_key != configuration.quality_key:
                continue
            if other != configuration:
                return record.reason
        return self.too_large(configuration, context)

    def too_large(self, configuration: Configuration, context: int) -> str:
        """Why it cannot fit: it did not at a shorter context, all of which a longer one holds as well; or the plan."""
        for shorter in self.workload.contexts:
            record = self.known.get((configuration, shorter))
            if shorter < context and record is not None and record.outcome in ("over_budget", "out_of_memory"):
                return f"at {shorter} tokens: {record.reason}"
        return self.fits(configuration, context)

    def _measured(self, configuration: Configuration, context: int, stage: str) -> Record:
        asked = self._asked
        trial = asked[2] if asked is not None and asked[:2] == (context, configuration) else None
        if trial is None and stage != "boundary":
            parameters = self.space.parameters(configuration)
            if parameters is not None:
                trial = self.studies.ask(context, parameters)
                self.space.suggest(trial)
        self._asked = None
        record = self.measure(configuration, context, stage)
        self.known[configuration, context] = record
        if trial is None:
            self.studies.keep(record)
        else:
            trial.set_user_attr(RECORD, json.dumps(record.to_json()))
            self.studies.tell(context, trial, record, self.workload, self.budget)
        self.on_record(record)
        return record

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


def _did_not_load(record: Record) -> bool:
    """Whether the load group itself failed; loading that took too long may have been the machine's doing."""
    return record.reason.startswith(_LOADING) and record.outcome != "timeout"


def complete(search: Search, group: LoadGroup) -> None:
    """Give a load group a record at every context, from the knobs that won elsewhere, its draft used and idle."""
    for context in search.workload.contexts:
        best = [
            record.configuration
            for record in sorted(
                (r for r in search.known.values() if r.outcome == "ok" and r.configuration.load_group == group),
                key=lambda record: -record.rate(search.workload.objective),
            )
        ]
        for candidate in list(dict.fromkeys(best))[:_TRIES]:
            if also(search, candidate, context) == "ok":
                break
        if group.draft != "none" and best:
            also(search, best[0].replace(depth=0), context)


def also(search: Search, configuration: Configuration, context: int) -> str:
    """The outcome of a configuration at a context, measured if there is time and it may fit; nothing if not."""
    known = (configuration, context) in search.known
    if not known and (search.now() >= search.deadline or search.too_large(configuration, context)):
        return ""
    return search.measured(configuration, context).outcome
