"""What is stored of a search, and told to Optuna."""

from __future__ import annotations

import json
import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from autotune.config import Configuration, Outcome, Record, Workload
from autotune.results import RECORD, RunError, open_storage, read_records
from autotune.search.space import Space
from autotune.search.study import Studies, importances
from tests.records import synthetic_record
from tests.searches import (
    BASELINES,
    BUDGET,
    CONTEXTS,
    IDENTITY,
    MIXED,
    SMALL,
    Fake,
    rate,
    search_in,
    space_of,
    studies_in,
    url,
)


def trials_of(folder: Path, context: int) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=f"run/{context}", storage=open_storage(url(folder))).get_trials()


def test_records_survive_the_storage_in_the_order_in_which_they_were_measured(tmp_path: Path) -> None:
    search = search_in(tmp_path, SMALL, Fake(lambda c, context: "ok" if context == 64 else "out_of_memory"))
    seen: list[Record] = []
    search.on_record = seen.append
    search.run()
    assert sorted(map(repr, read_records(url(tmp_path), "run"))) == sorted(map(repr, seen))
    search.studies.keep(last := synthetic_record(Configuration(), 64, stage="final"))
    assert read_records(url(tmp_path), "run")[-1] == last


def test_what_the_sampler_is_told_is_what_was_measured(tmp_path: Path) -> None:
    search_in(tmp_path, MIXED, Fake(), max_trials=30).run()
    for context in CONTEXTS:
        trials = trials_of(tmp_path, context)
        assert not [t.number for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
        measured = [t for t in trials if RECORD in t.user_attrs]
        assert measured
        for trial in measured:
            record = Record.from_json(json.loads(trial.user_attrs[RECORD]))
            assert trial.params == MIXED.parameters(record.configuration)
            assert trial.values == pytest.approx([rate(record.configuration, context), 1.0])


@pytest.mark.parametrize("outcome", ["out_of_memory", "unsupported", "timeout", "crashed"])
def test_a_failure_without_figures_is_told_as_pruned_with_a_violated_constraint(
    tmp_path: Path, outcome: Outcome
) -> None:
    search_in(tmp_path, space_of(), Fake(lambda c, context: outcome)).run()
    (trial,) = (t for t in trials_of(tmp_path, 64) if RECORD in t.user_attrs)
    assert trial.state == TrialState.PRUNED
    assert trial.system_attrs["constraints:outcome"] > 0
    assert trial.user_attrs["outcome"] == outcome


VIOLATED: dict[Outcome, list[str]] = {
    "ok": [],
    "over_budget": ["footprint", "outcome"],
    "quality_loss": ["outcome", "quality"],
    "wrong_output": ["outcome"],
    "unstable": ["outcome"],
}


@pytest.mark.parametrize(("outcome", "violated"), VIOLATED.items())
def test_measured_constraints_are_told_by_name(tmp_path: Path, outcome: Outcome, violated: list[str]) -> None:
    search_in(tmp_path, space_of(), Fake(lambda c, context: outcome)).run()
    (trial,) = (t for t in trials_of(tmp_path, 64) if RECORD in t.user_attrs)
    told = {name.removeprefix("constraints:"): value for name, value in trial.system_attrs.items()}
    assert trial.state == TrialState.COMPLETE
    assert sorted(name for name, value in told.items() if isinstance(value, float) and value > 0) == violated
    assert {"footprint", "quality", "outcome"} <= told.keys()


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_does_not_end_the_search(tmp_path: Path, ratio: float) -> None:
    measure = Fake(lambda c, context: "quality_loss", ratio=ratio)
    search_in(tmp_path, space_of(cache=("dynamic", "static"), launch=("eager", "graph")), measure).run()
    assert len({configuration.cache for configuration, _ in measure.calls}) == 2
    for trial in trials_of(tmp_path, 64):
        assert trial.state == TrialState.PRUNED


def test_a_storage_of_another_workload_is_refused_with_what_differs_and_left_as_it_was(tmp_path: Path) -> None:
    mine = studies_in(tmp_path)
    running = mine.ask(64)
    with pytest.raises(RunError, match=r"another workload, budget: .*--out"):
        studies_in(tmp_path, IDENTITY | {"workload": {"contexts": [128]}, "budget": {"bytes": 1}}, (64, 128))
    names = {study.study_name for study in mine.storage.get_all_studies()}
    assert names == {"run/64", "run/256", "run/records"}
    assert trials_of(tmp_path, 64)[running.number].state == TrialState.RUNNING


def test_runs_of_other_names_share_a_storage(tmp_path: Path) -> None:
    search_in(tmp_path, space_of(), Fake()).run()
    other = Studies(url(tmp_path), "run-2", {"model": "another"}, (64,), seed=0)
    other.keep(theirs := synthetic_record(Configuration(), 64))
    assert read_records(url(tmp_path), "run-2") == [theirs]
    assert len(read_records(url(tmp_path), "run")) == 2


def test_trials_of_a_killed_run_fail_when_it_is_opened_again(tmp_path: Path) -> None:
    killed = studies_in(tmp_path)
    killed.ask(64)
    killed.by_context[64].enqueue_trial({"cache": "static"})
    reopened = studies_in(tmp_path)
    assert [trial.state for trial in trials_of(tmp_path, 64)] == [TrialState.FAIL, TrialState.FAIL]
    asked = reopened.ask(64, {"weights": "bnb-nf4", "cache": "dynamic", "prefill_chunk": 32})
    assert SMALL.suggest(asked) == Configuration(weights="bnb-nf4", prefill_chunk=32)


def test_the_sampler_hears_of_the_baseline(tmp_path: Path) -> None:
    search_in(tmp_path, SMALL, Fake()).baseline(BASELINES)
    (trial,) = trials_of(tmp_path, 64)
    assert trial.params == SMALL.parameters(BASELINES[0])
    assert trial.state == TrialState.COMPLETE


CACHES = space_of(cache=("dynamic", "static", "quantized-4"), launch=("eager", "graph")).choices
WIDE = Space({"attention": ("sdpa", "split_kv")} | {knob: CACHES[knob] for knob in CACHES if knob != "attention"})


def told(folder: Path, configurations: list[Configuration], remembered: bool = False) -> None:
    """Trials at 64 tokens as a search leaves them, a graph fastest; those told from memory hold no record."""
    studies = studies_in(folder, contexts=(64,))
    for number, configuration in enumerate(configurations):
        trial = studies.ask(64, WIDE.parameters(configuration))
        assert WIDE.suggest(trial) == configuration
        speed = (60 if configuration.launch == "graph" else 30) + number / 100
        record = synthetic_record(configuration, 64, (speed,) * 3)
        if not remembered:
            trial.set_user_attr(RECORD, json.dumps(record.to_json()))
        studies.tell(64, trial, record, Workload(contexts=(64,)), BUDGET)


def test_the_knob_that_makes_it_fast_is_the_most_important(tmp_path: Path) -> None:
    told(tmp_path, list(WIDE.configurations()) * 2)
    shares = importances(url(tmp_path), "run", (64, 256))
    assert list(shares) == [64]
    assert next(iter(shares[64])) == "launch"
    assert set(shares[64]) == {"attention", "cache", "launch"}  # and no "cache of 2"
    assert sum(shares[64].values()) == pytest.approx(1)
    assert list(shares[64].values()) == sorted(shares[64].values(), reverse=True)


@pytest.mark.parametrize(("measured", "enough"), [(9, False), (10, True)])
def test_importances_take_ten_trials_that_were_measured(tmp_path: Path, measured: int, enough: bool) -> None:
    configurations = list(WIDE.configurations()) * 2
    told(tmp_path, configurations[:measured])
    told(tmp_path, configurations[:8], remembered=True)
    assert bool(importances(url(tmp_path), "run", (64,))) == enough
