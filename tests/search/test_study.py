"""The search, driven by a measurement that is a formula: no model, no torch."""

from __future__ import annotations

import json
import math
import time
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autotune.config import Configuration, Outcome, Record, Workload
from autotune.policy.choice import best_group, best_in_group
from autotune.results import RECORD, RunError, open_storage, read_records
from autotune.search.search import Search, also, complete
from autotune.search.space import Space, read_space, stock_configurations
from autotune.search.study import Studies, importances
from tests.records import synthetic_record
from tests.searches import BUDGET, CONTEXTS, DRAFT, IDENTITY, MIXED, Fake, rate, search_in, space_of, studies_in, url

BASELINES = [Configuration(), Configuration(weights="bnb-nf4")]


SMALL = space_of(weights=("bf16", "bnb-nf4"), cache=("dynamic", "static"), prefill_chunk=(0, 32))


def trials_of(folder: Path, context: int) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=f"run/{context}", storage=open_storage(url(folder))).get_trials()


def trials_in(search: Search, context: int) -> list[optuna.trial.FrozenTrial]:
    return search.studies.by_context[context].get_trials()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves only when it is told to."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("autotune.search.search.time", SimpleNamespace(monotonic=lambda: now.s))
    return now


class Noisy(Fake):
    """Each look at a pair has the next of its rates, its rounds a tenth apart; without such it goes by the formula."""

    def __init__(self, rates: dict[tuple[Configuration, int], list[float]]):
        super().__init__()
        self.rates = rates

    def __call__(self, configuration: Configuration, context: int, stage: str) -> Record:
        record = super().__call__(configuration, context, stage)
        if not (left := self.rates.get((configuration, context))):
            return record
        middle = left.pop(0)
        return synthetic_record(configuration, context, (0.9 * middle, middle, 1.1 * middle), stage=stage)


TWO = space_of(weights=("bf16", "bnb-nf4"))
SLOWER, FASTER = TWO.configurations()


@pytest.mark.usefixtures("in_memory")
def test_load_groups_within_error_of_each_other_are_looked_at_again(tmp_path: Path) -> None:
    rates = {(SLOWER, 64): [110.0, 90.0, 90.0, 90.0], (FASTER, 64): [100.0] * 4}
    search = search_in(tmp_path, TWO, measure := Noisy(rates), contexts=(64,))
    search.run()
    assert measure.calls[:2].count((SLOWER, 64)) == 1
    assert 1 <= measure.calls[2:].count((SLOWER, 64)) <= 2  # two more looks at most
    assert measure.calls.count((FASTER, 64)) <= 3
    rounds = search.known[SLOWER, 64].round_rates("end-to-end")
    assert len(rounds) == 3 * measure.calls.count((SLOWER, 64))
    best = best_in_group(search.known.values(), None, 64, "end-to-end")
    assert best is not None
    assert best.configuration == FASTER
    stored = [t for t in trials_in(search, 64) if t.params["weights"] == "bf16"]
    assert [json.loads(t.user_attrs[RECORD])["tokens_per_s"] for t in stored][:2] == [110.0, 90.0]


@pytest.mark.usefixtures("in_memory")
def test_what_is_clear_is_not_looked_at_again(tmp_path: Path) -> None:
    search = search_in(tmp_path, TWO, measure := Noisy({(SLOWER, 64): [70.0], (FASTER, 64): [120.0]}), contexts=(64,))
    search.run()
    assert len(measure.calls) == 2


@pytest.mark.usefixtures("in_memory")
def test_within_a_load_group_the_leader_and_its_runner_up_are_looked_at_again(tmp_path: Path) -> None:
    space = space_of(cache=("dynamic", "static", "quantized-4"))
    caches = dict(zip(("dynamic", "static", "quantized-4"), ([100.0] * 5, [103.0] * 5, [50.0]), strict=True))
    rates = {(Configuration(cache=cache), 64): looks for cache, looks in caches.items()}
    search = search_in(tmp_path, space, measure := Noisy(rates), contexts=(64,))
    search.run()
    again = {configuration.cache for configuration, _ in measure.calls[3:]}
    assert again
    assert again <= {"dynamic", "static"}


@pytest.mark.usefixtures("in_memory")
def test_second_looks_count_as_trials_and_a_failed_one_stands(tmp_path: Path) -> None:
    rates = {(SLOWER, 64): [104.0] * 9, (FASTER, 64): [100.0] * 9}
    limited = search_in(tmp_path / "a", TWO, measure := Noisy(dict(rates)), contexts=(64,), max_trials=3)
    limited.run()
    assert len(measure.calls) == 3
    search = search_in(tmp_path / "b", TWO, Noisy({}), contexts=(64,))
    search.measured(SLOWER, 64)
    search.learn(Record(SLOWER, 64, "out_of_memory", "it failed"))
    assert search.known[SLOWER, 64].outcome == "out_of_memory"
    assert search.again == []


@pytest.mark.usefixtures("in_memory")
def test_where_reading_sets_the_pace_what_reads_least_is_looked_at_first(tmp_path: Path) -> None:
    size = {"bf16": 16e9, "bnb-nf4": 5e9, "quanto-int4": 4e9}

    def first(**options: Any) -> str:
        search_in(tmp_path, MIXED, measure := Fake(), max_trials=1, **options).run()
        return measure.calls[0][0].weights

    assert first() == "bf16"
    assert first(step_bytes=lambda c, context: size[c.weights]) == "quanto-int4"


@pytest.mark.usefixtures("in_memory")
def test_everything_is_measured_once_and_then_the_search_ends(tmp_path: Path) -> None:
    measure = Fake()
    search_in(tmp_path, SMALL, measure).run()
    everything = {(configuration, context) for configuration in SMALL.configurations() for context in CONTEXTS}
    assert len(measure.calls) == len(everything) == 16
    assert set(measure.calls) == everything


@pytest.mark.usefixtures("in_memory")
def test_what_is_the_same_thing_at_a_context_is_measured_once_there(tmp_path: Path) -> None:
    measure = Fake()
    chunks = Space({**SMALL.choices, "prefill_chunk": (0, 64, 128)})  # of the contexts, the shorter fits one chunk
    assert CONTEXTS == (64, 256)
    search_in(tmp_path, chunks, measure).run()
    alike = [(configuration.at(context), context) for configuration, context in measure.calls]
    assert len(set(alike)) == len(alike)
    assert set(alike) == {(c.at(context), context) for c in chunks.configurations() for context in CONTEXTS}


def test_nothing_is_measured_again_when_a_run_is_continued(tmp_path: Path) -> None:
    first, second, third = Fake(), Fake(), Fake()
    search_in(tmp_path, SMALL, first, max_trials=5).run()
    search_in(tmp_path, SMALL, second, max_trials=11).run()
    search_in(tmp_path, SMALL, third).run()
    calls = first.calls + second.calls + third.calls
    assert [len(fake.calls) for fake in (first, second, third)] == [5, 6, 5]
    assert len(set(calls)) == len(calls)
    assert {(r.configuration, r.context_tokens) for r in read_records(url(tmp_path), "run")} == set(calls)


def test_records_survive_the_storage_in_the_order_in_which_they_were_measured(tmp_path: Path) -> None:
    search = search_in(tmp_path, SMALL, Fake(lambda c, context: "ok" if context == 64 else "out_of_memory"))
    seen: list[Record] = []
    search.on_record = seen.append
    search.run()
    assert sorted(map(repr, read_records(url(tmp_path), "run"))) == sorted(map(repr, seen))
    search.studies.keep(last := synthetic_record(Configuration(), 64, stage="final"))
    assert read_records(url(tmp_path), "run")[-1] == last


@pytest.mark.usefixtures("in_memory")
def test_the_search_stops_at_its_number_of_trials(tmp_path: Path) -> None:
    measure = Fake()
    search = search_in(tmp_path, SMALL, measure, max_trials=7)
    search.baseline(BASELINES)
    search.run()
    assert measure.stages.count("search") == 7
    assert measure.stages.count("baseline") == 2


@pytest.mark.usefixtures("in_memory")
def test_the_search_stops_at_its_deadline(tmp_path: Path, clock: SimpleNamespace) -> None:
    measure = Fake()
    measure.on_call = lambda: setattr(clock, "s", clock.s + 10)
    search_in(tmp_path, SMALL, measure, deadline=35).run()
    assert len(measure.calls) == 4


@pytest.mark.usefixtures("in_memory")
def test_nothing_is_measured_after_the_deadline(tmp_path: Path, clock: SimpleNamespace) -> None:
    measure = Fake()
    clock.s = 100
    search_in(tmp_path, SMALL, measure, deadline=100).run()
    assert measure.calls == []


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


def stays(measure: Fake) -> list[int]:
    """How many measurements in a row had the same load group."""
    return [len(list(calls)) for _, calls in groupby(measure.calls, key=lambda call: call[0].load_group)]


@pytest.mark.usefixtures("in_memory")
def test_a_load_that_takes_long_is_shared_by_more_looks(tmp_path: Path) -> None:
    loads = []
    for load_s in (0.0, 30.0):
        measure = Fake(load_s=load_s, measure_s=1.0)
        search_in(tmp_path, MIXED, measure, max_trials=50).run()
        loads.append(len(stays(measure)))
    assert 1 < loads[1] < loads[0]


@pytest.mark.usefixtures("in_memory", "clock")  # it would never come to the deadline
def test_a_load_group_that_runs_out_before_its_load_is_paid_for_is_left(tmp_path: Path) -> None:
    measure = Fake(load_s=1000.0, measure_s=1.0)
    search_in(tmp_path, SMALL, measure, deadline=60).run()
    assert len(measure.calls) == 16
    assert len(stays(measure)) <= 3


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize(("outcome", "tries"), [("out_of_memory", 1), ("unsupported", 1), ("timeout", 16)])
def test_a_load_group_that_does_not_load_is_tried_once(tmp_path: Path, outcome: Outcome, tries: int) -> None:
    class DoesNotLoad(Fake):
        def __call__(self, configuration: Configuration, context: int, stage: str) -> Record:
            record = super().__call__(configuration, context, stage)
            if configuration.weights == "bnb-nf4":
                return record
            return Record(configuration, context, outcome, "while loading: it failed", measure_s=1.0)

    space = space_of(weights=("bf16", "bnb-nf4"), cache=("dynamic", "static"), prefill_chunk=(0, 8, 16, 32))
    measure = DoesNotLoad(load_s=5.0)
    search_in(tmp_path, space, measure).run()
    weights = [configuration.weights for configuration, _ in measure.calls]
    assert weights.count("bnb-nf4") == 16
    assert weights.count("bf16") == tries


@pytest.mark.usefixtures("in_memory")
def test_a_context_where_nothing_fits_does_not_end_the_search_of_the_others(tmp_path: Path) -> None:
    measure = Fake()
    search = search_in(tmp_path, SMALL, measure, fits=lambda c, context: "too large" if context == 256 else "")
    search.run()
    assert len(measure.calls) == 8
    assert {context for _, context in measure.calls} == {64}


def test_what_the_plan_excludes_is_never_measured(tmp_path: Path) -> None:
    measure = Fake()
    search_in(tmp_path, SMALL, measure, fits=lambda c, context: "" if c.weights == "bnb-nf4" else "too large").run()
    assert {configuration.weights for configuration, _ in measure.calls} == {"bnb-nf4"}


@pytest.mark.usefixtures("in_memory")
def test_what_loses_quality_once_is_not_tried_with_another_draft_or_launch(tmp_path: Path) -> None:
    space = space_of(cache=("dynamic", "quantized-4"), draft=("none", "prompt-lookup"), launch=("eager", "graph"))
    measure = Fake(lambda c, context: "quality_loss" if c.cache == "quantized-4" else "ok")
    search_in(tmp_path, space, measure, contexts=(64,)).run()
    assert [configuration.cache for configuration, _ in measure.calls].count("quantized-4") == 1
    assert [configuration.cache for configuration, _ in measure.calls].count("dynamic") == 2


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_of_a_small_space_is_found_in_a_part_of_it(tmp_path: Path, seed: int) -> None:
    measure = Fake(lambda c, context: "over_budget" if c.weights == "bf16" else "ok", load_s=4.0)
    search = search_in(tmp_path, MIXED, measure, max_trials=100, seed=seed)
    search.run()
    everything = list(MIXED.configurations())
    assert len(everything) == 210
    group = best_group(search.known.values(), search.workload)
    assert group is not None
    for context in CONTEXTS:
        best = max(rate(c, context) for c in everything)
        found = best_in_group(search.known.values(), group, context, "end-to-end")
        assert found is not None
        assert rate(found.configuration, context) >= 0.95 * best


@pytest.mark.usefixtures("in_memory")
def test_what_comes_to_lead_is_looked_at_with_its_draft_model_idle_at_every_context(tmp_path: Path) -> None:
    space = space_of(draft=(DRAFT,), depth=(2, 4), cache=("dynamic", "static"), launch=("eager", "graph"))
    favoured = Configuration(draft=DRAFT, draft_weights="bf16", depth=4, cache="static", launch="graph", lm_head="bf16")
    search_in(tmp_path, space, measure := Fake(load_s=4.0), max_trials=4, first=(favoured,)).run()
    began = {context: configuration for configuration, context in measure.calls[:2]}
    assert began.keys() == set(CONTEXTS)
    assert measure.calls[2:] == [(began[context].replace(depth=0), context) for context in CONTEXTS]
    assert all(configuration.depth for configuration in began.values())


def test_the_baseline_is_nf4_where_bf16_goes_over_the_budget(tmp_path: Path) -> None:
    measure = Fake(lambda c, context: "over_budget" if (c.weights, context) == ("bf16", 256) else "ok")
    search = search_in(tmp_path, SMALL, measure)
    search.baseline(BASELINES)
    found = [search.baseline_of(context, BASELINES) for context in CONTEXTS]
    assert [record.configuration.weights for record in found if record is not None] == ["bf16", "bnb-nf4"]
    assert set(measure.stages) == {"baseline"}
    assert len(measure.calls) == 3


def test_a_baseline_that_the_plan_excludes_is_not_measured(tmp_path: Path) -> None:
    measure = Fake()
    search = search_in(tmp_path, SMALL, measure, fits=lambda c, context: "too large" if c.weights == "bf16" else "")
    search.baseline(BASELINES)
    assert [configuration.weights for configuration, _ in measure.calls] == ["bnb-nf4", "bnb-nf4"]


def test_there_is_no_baseline_where_none_fits_and_it_is_not_tried_again(tmp_path: Path) -> None:
    first, second = Fake(lambda c, context: "out_of_memory"), Fake()
    search_in(tmp_path, SMALL, first).baseline(BASELINES)
    continued = search_in(tmp_path, SMALL, second)
    continued.baseline(BASELINES)
    assert len(first.calls) == 2  # at the shorter context only
    assert second.calls == []
    assert continued.baseline_of(64, BASELINES) is None


def test_the_sampler_hears_of_the_baseline(tmp_path: Path) -> None:
    search_in(tmp_path, SMALL, Fake()).baseline(BASELINES)
    (trial,) = trials_of(tmp_path, 64)
    assert trial.params == SMALL.parameters(BASELINES[0])
    assert trial.state == TrialState.COMPLETE


@pytest.mark.parametrize("full_precision", ["bf16", "fp32"])
def test_the_baselines_are_in_the_space_of_every_machine(full_precision: str) -> None:
    space = read_space("default").restrict(
        device="cpu", full_precision=full_precision, drafts=[], sliding=False, quantized=False, failed={}
    )
    stock = stock_configurations(full_precision, space)
    assert [c.weights for c in stock] == [full_precision, "bnb-nf4", "bnb-nf4"]
    assert all(space.parameters(c) is not None for c in stock)


def test_the_baseline_of_a_quantized_checkpoint_is_the_checkpoint() -> None:
    space = read_space("default").restrict(
        device="cpu", full_precision="fp32", drafts=[], sliding=False, quantized=True, failed={}
    )
    (stock,) = stock_configurations("fp32", space)
    assert stock.weights == "checkpoint"
    assert space.parameters(stock) is not None


def test_the_baseline_is_stock_whatever_the_space_holds() -> None:
    space = Space({**SMALL.choices, "attention": ("split_kv",)})
    assert {c.attention for c in stock_configurations("bf16", space)} == {"sdpa"}
    lost = Space({**SMALL.choices, "attention": ("eager",)}, dropped=(("attention", "sdpa", "the model has none"),))
    assert {c.attention for c in stock_configurations("bf16", lost)} == {"eager"}


def test_the_search_begins_with_what_needs_no_load_after_the_baseline(tmp_path: Path) -> None:
    measure = Fake()
    lookup = Configuration(draft="prompt-lookup", depth=4, cache="static")
    other = Configuration(weights="quanto-int4", draft="prompt-lookup", depth=4, cache="static")
    search = search_in(tmp_path, MIXED, measure, first=(other, lookup, Configuration()), max_trials=3)
    search.baseline([Configuration()])
    search.run()
    assert measure.calls[:2] == [(Configuration(), 64), (Configuration(), 256)]
    assert measure.calls[2:4] == [(lookup, 64), (lookup, 256)]
    assert len(measure.calls) == 5
    again = search_in(tmp_path, MIXED, measure, first=(lookup,), max_trials=3)
    again.run()  # what is known is not measured again
    assert len(measure.calls) == 5


def winner_at_64(folder: Path, measure: Fake, winners: list[Configuration], **options: Any) -> Search:
    """A search that knows some configurations at the short context only."""
    search = search_in(folder, MIXED, measure, **options)
    for configuration in winners:
        search.known[configuration, 64] = synthetic_record(configuration, 64, (rate(configuration, 64),) * 3)
    return search


def test_the_winner_gets_a_record_at_every_context_and_its_draft_is_tried_idle(tmp_path: Path) -> None:
    measure = Fake()
    best = Configuration(weights="quanto-int4", draft=DRAFT, draft_weights="bf16", depth=4, cache="static")
    search = winner_at_64(tmp_path, measure, [best, best.replace(cache="dynamic")])
    complete(search, best.load_group)
    assert set(measure.calls) == {(best, 256), (best.replace(depth=0), 64), (best.replace(depth=0), 256)}
    kept = {(r.configuration, r.context_tokens) for r in read_records(url(tmp_path), "run")}
    assert kept == set(measure.calls)


def test_a_winner_without_a_draft_model_is_only_completed(tmp_path: Path) -> None:
    measure = Fake()
    best = Configuration(weights="quanto-int4", cache="static")
    complete(winner_at_64(tmp_path, measure, [best]), best.load_group)
    assert measure.calls == [(best, 256)]


def test_where_the_winner_fails_at_another_context_the_next_best_of_its_group_is_tried(tmp_path: Path) -> None:
    measure = Fake(lambda c, context: "over_budget" if c.cache == "static" else "ok")
    best = Configuration(weights="quanto-int4", cache="static")
    search = winner_at_64(tmp_path, measure, [best.replace(cache="dynamic"), best])
    complete(search, best.load_group)
    assert measure.calls == [(best, 256), (best.replace(cache="dynamic"), 256)]


def test_the_winner_is_not_completed_past_the_deadline_or_where_the_plan_excludes_it(tmp_path: Path) -> None:
    late, large = Fake(), Fake()
    best = Configuration(weights="quanto-int4", cache="static")
    complete(winner_at_64(tmp_path, late, [best], deadline=time.monotonic() - 1), best.load_group)
    complete(winner_at_64(tmp_path, large, [best], fits=lambda c, context: "too large"), best.load_group)
    assert late.calls == large.calls == []


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


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("outcome", ["out_of_memory", "over_budget"])
def test_what_did_not_fit_at_a_shorter_context_is_not_tried_at_a_longer_one(tmp_path: Path, outcome: Outcome) -> None:
    large = BASELINES[:1]
    fake = Fake(lambda c, context: outcome if c in large and context == 64 else "ok")
    search = search_in(tmp_path, SMALL, fake)
    search.baseline(BASELINES)
    search.run()
    assert {(c, 64) for c in large} <= set(fake.calls)
    assert not {(c, 256) for c in large} & set(fake.calls)
    assert (BASELINES[1], 256) in fake.calls
    assert len(fake.calls) == 2 * 8 - len(large)
    assert also(search, large[0], 256) == ""


def test_what_does_not_fit_at_a_longer_context_is_tried_at_a_shorter_one(tmp_path: Path) -> None:
    fake = Fake(lambda c, context: "out_of_memory" if context == 256 else "ok")
    search_in(tmp_path, SMALL, fake, contexts=(256, 64)).baseline(BASELINES[:1])
    assert fake.calls == [(BASELINES[0], 256), (BASELINES[0], 64)]


def chunked(tokens: int) -> Configuration:
    return Configuration(prefill_chunk=tokens)


@pytest.mark.usefixtures("in_memory")
def test_what_ran_out_of_memory_rules_out_what_needs_no_less(tmp_path: Path) -> None:
    space = space_of(cache=("dynamic", "static"), prefill_chunk=(0, 16, 32))
    needs = {0: 3, 16: 1, 32: 2}
    small = BUDGET.bytes // 100
    fake = Fake(lambda c, context: "out_of_memory" if c == chunked(32) else "ok")
    search = search_in(
        tmp_path, space, fake, contexts=(64,), predicted=lambda c, context: small * needs[c.prefill_chunk]
    )
    search.measured(chunked(32), 64)
    assert "with what needs no more" in search.too_large(chunked(0), 64)
    assert search.too_large(chunked(16), 64) == ""
    assert search.too_large(chunked(0).replace(cache="static"), 64) == ""
    search.run()
    assert {c for c, _ in fake.calls} == set(space.configurations()) - {chunked(0)}


@pytest.mark.usefixtures("in_memory")
def test_running_out_of_memory_makes_its_neighbours_less_likely_to_fit(tmp_path: Path) -> None:
    space = space_of(weights=("bf16", "bnb-nf4"), cache=("dynamic", "static", "quantized-4"), launch=("eager", "graph"))
    fake = Fake(lambda c, context: "out_of_memory")
    search = search_in(tmp_path, space, fake, contexts=(64,), predicted=lambda c, context: BUDGET.bytes)
    near, far = Configuration(launch="graph"), Configuration(weights="bnb-nf4", cache="static", launch="graph")
    before = search._pairs.chance(near, 64)
    search.measured(Configuration(), 64)
    after = [search._pairs.chance(configuration, 64) for configuration in (Configuration(), near, far)]
    assert before == pytest.approx(0.5)
    assert after[0] < after[1] < after[2] < before


@pytest.mark.usefixtures("in_memory")
def test_a_peak_that_was_measured_corrects_what_is_predicted(tmp_path: Path) -> None:
    fake = Fake(peak=int(BUDGET.bytes * 0.9))
    search = search_in(tmp_path, SMALL, fake, contexts=(64,), predicted=lambda c, context: int(BUDGET.bytes * 0.95))
    before = search._pairs.chance(Configuration(cache="static"), 64)
    search.measured(Configuration(), 64)
    assert search._pairs.chance(Configuration(cache="static"), 64) > before + 0.05


def large(c: Configuration) -> bool:
    return (sum(map(ord, f"{c.weights} {c.cache} {c.launch} {c.draft}")) % 3) > 0


@pytest.mark.usefixtures("in_memory")
def test_about_a_tenth_of_the_looks_go_over_the_budget_and_the_search_ends_where_more_would(tmp_path: Path) -> None:
    fake = Fake(lambda c, context: "out_of_memory" if large(c) else "ok", peak=int(0.99 * BUDGET.bytes))
    everything = [(c, context) for c in MIXED.configurations() for context in CONTEXTS]
    assert sum(large(c) for c, _ in everything) > 0.6 * len(everything)
    search = search_in(tmp_path, MIXED, fake, predicted=lambda c, context: int(0.99 * BUDGET.bytes))
    search.run()
    over = sum(large(c) for c, _ in fake.calls)
    assert 10 < len(fake.calls) < 0.5 * len(everything)
    assert over <= 0.25 * len(fake.calls)


@pytest.mark.usefixtures("in_memory")
def test_what_hardly_fits_is_tried_while_nothing_is_known_that_does(tmp_path: Path) -> None:
    fake = Fake(lambda c, context: "ok" if (c.weights, c.cache) == ("bf16", "static") else "out_of_memory")
    search = search_in(tmp_path, SMALL, fake, contexts=(64,), predicted=lambda c, context: int(1.04 * BUDGET.bytes))
    search.run()
    assert {(c.weights, c.cache) for c, _ in fake.calls} == set(product(("bf16", "bnb-nf4"), ("dynamic", "static")))


@pytest.mark.usefixtures("in_memory")
def test_the_share_of_the_gain_that_is_open_falls_to_nothing(tmp_path: Path) -> None:
    search = search_in(tmp_path, MIXED, Fake(load_s=4.0), first=(Configuration(),))
    search.baseline(BASELINES)
    shares: list[float | None] = []
    search.on_record = lambda record: shares.append(search.open)
    assert search.open is None
    search.run()
    told = [share for share in shares if share is not None]
    assert all(0 <= share <= 1 for share in told)
    assert told[0] == 1 > 0.5 > told[len(told) // 4]  # nothing is gained yet over the baselines
    assert search.open == 0  # nothing is left
    assert max(told[-20:]) < 0.02


@pytest.mark.usefixtures("in_memory")
def test_the_gain_that_is_open_is_a_share_of_what_was_gained_over_the_baseline(tmp_path: Path) -> None:
    shares = []
    for slower in (1.0, 3.0):
        search = search_in(tmp_path, SMALL, Fake(), contexts=(64,))
        first, second = Configuration(), Configuration(cache="static")
        search.known[first, 64] = synthetic_record(first, 64, (30.0 / slower,) * 3, stage="baseline")
        search.known[second, 64] = synthetic_record(second, 64, (36.0,) * 3)
        search._next()
        outlook = search._outlook
        more = max(outlook.worth[~outlook.pairs.out])
        shares.append(search.open)
        assert search.open == pytest.approx(more / (more + math.log(36 * slower / 30)))
    assert shares[1] < shares[0]


def test_a_baseline_that_may_not_fit_waits_until_more_is_known(tmp_path: Path) -> None:
    fake = Fake(peak=int(BUDGET.bytes * 0.9))
    sizes = {"bf16": 0.99, "bnb-nf4": 0.5}
    search = search_in(tmp_path, SMALL, fake, predicted=lambda c, context: int(BUDGET.bytes * sizes[c.weights]))
    search.baseline(BASELINES[:1], sure=0.8)
    assert fake.calls == []
    search.baseline(BASELINES, sure=0.8)
    assert {configuration.weights for configuration, _ in fake.calls} == {"bnb-nf4"}
    search.known.clear()
    search.baseline(BASELINES)
    assert {configuration.weights for configuration, _ in fake.calls[2:]} == {"bf16"}


@pytest.mark.usefixtures("in_memory")
def test_the_leading_load_group_is_measured_at_every_context_first(tmp_path: Path) -> None:
    measure = Fake(load_s=9.0, measure_s=1.0)
    search_in(tmp_path, MIXED, measure, max_trials=2).run()
    assert {context for _, context in measure.calls} == set(CONTEXTS)
    assert len({configuration.load_group for configuration, _ in measure.calls}) == 1


@pytest.mark.usefixtures("in_memory")
def test_a_load_group_is_measured_where_a_look_is_dear_too_before_others_are_begun(tmp_path: Path) -> None:
    class Dear(Fake):
        def __call__(self, configuration: Configuration, context: int, stage: str) -> Record:
            self.figures = {"load_s": 10.0, "measure_s": 12.0 if context == 4096 else 3.0}
            return super().__call__(configuration, context, stage)

    choices = MIXED.choices | {"lm_head": ("bf16", "int4"), "attention": ("sdpa", "eager"), "prefill_chunk": (0,)}
    contexts = (64, 128, 256, 4096)
    search = search_in(tmp_path, Space(choices), measure := Dear(), contexts=contexts, max_trials=14)
    search.baseline(BASELINES)
    search.run()
    begun = {configuration.load_group for configuration, _ in measure.calls[4:]}
    lacking = [g for g in begun if len({context for c, context in measure.calls if c.load_group == g}) < 4]
    assert len(lacking) <= 1 < len(begun)


@pytest.mark.usefixtures("in_memory")
def test_a_space_that_is_too_large_to_weigh_whole_is_searched_from_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.search.pairs._POOL", 50)
    monkeypatch.setattr("autotune.search.pairs._DRAWN", 20)
    measure = Fake(load_s=4.0)
    search = search_in(tmp_path, MIXED, measure, max_trials=60)
    search.run()
    best = max(rate(c, 64) for c in MIXED.configurations())
    assert max(rate(c, 64) for c, context in measure.calls if context == 64) >= 0.95 * best
    assert len(search._pairs.pool.pairs) < 2 * 210


@pytest.mark.usefixtures("in_memory")
def test_a_large_space_is_measured_whole_where_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.search.pairs._POOL", 2)
    monkeypatch.setattr("autotune.search.pairs._DRAWN", 40)
    measure = Fake()
    search_in(tmp_path, SMALL, measure).run()
    assert len(set(measure.calls)) == len(measure.calls) == 16


@pytest.mark.usefixtures("in_memory")
def test_a_resident_draft_is_also_tried_idle(tmp_path: Path) -> None:
    space = space_of(draft=(DRAFT,), cache=("dynamic", "static"))
    search_in(tmp_path, space, measure := Fake(), contexts=(64,)).run()
    tried = {(configuration.depth, configuration.cache) for configuration, _ in measure.calls}
    assert tried == set(product((0, 4), ("dynamic", "static")))
