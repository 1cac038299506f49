"""Which look comes next, and what is open when the search ends."""

from __future__ import annotations

import json
import math
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest

from autotune.config import Configuration, Record
from autotune.policy.choice import best_in_group
from autotune.results import RECORD
from autotune.search.space import Space
from tests.records import synthetic_record
from tests.searches import BASELINES, BUDGET, CONTEXTS, MIXED, SMALL, Fake, search_in, space_of, trials_in


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
