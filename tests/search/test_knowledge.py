"""What is ruled out by what was measured, and by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.config import Configuration, Outcome, Record
from autotune.search.search import also
from tests.searches import BASELINES, BUDGET, SMALL, Fake, search_in, space_of


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
