"""The studies of a run: the only file that talks to Optuna's study API.

There is a study per context, with two objectives (rate up, perplexity down) and measured constraints (footprint,
quality); a study keeps what was measured, and what to try is enqueued to it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import TrialState

from ..config import Budget, Record, Workload
from ..results import RECORD, RunError, open_storage

_FINISHED = 10  # trials of a context from which on importances are told; chosen, not measured


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
