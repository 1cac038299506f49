"""What is believed of pairs, and how a large space is drawn from."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.config import Configuration
from tests.searches import BUDGET, MIXED, SMALL, Fake, rate, search_in, space_of


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
