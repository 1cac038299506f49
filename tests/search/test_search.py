"""The search, driven by a measurement that is a formula: no model, no torch."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.config import Configuration
from autotune.policy.choice import best_group, best_in_group
from autotune.results import read_records
from autotune.search.search import Search, complete
from autotune.search.space import Space, read_space, stock_configurations
from tests.records import synthetic_record
from tests.searches import BUDGET, CONTEXTS, DRAFT, MIXED, Fake, rate, search_in, space_of, url

from ..searches import BASELINES, SMALL


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


@pytest.mark.usefixtures("in_memory")
def test_a_context_where_nothing_fits_does_not_end_the_search_of_the_others(tmp_path: Path) -> None:
    measure = Fake()
    search = search_in(tmp_path, SMALL, measure, fits=lambda c, context: "too large" if context == 256 else "")
    search.run()
    assert len(measure.calls) == 8
    assert {context for _, context in measure.calls} == {64}


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
def test_a_resident_draft_is_also_tried_idle(tmp_path: Path) -> None:
    space = space_of(draft=(DRAFT,), cache=("dynamic", "static"))
    search_in(tmp_path, space, measure := Fake(), contexts=(64,)).run()
    tried = {(configuration.depth, configuration.cache) for configuration, _ in measure.calls}
    assert tried == set(product((0, 4), ("dynamic", "static")))
