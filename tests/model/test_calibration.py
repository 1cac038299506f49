"""What measured peaks correct, and how far the corrected plan is to be believed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.config import CACHES, MIB, Configuration, Record
from autotune.model.calibration import DEFAULT, SPREAD, calibrate
from autotune.model.footprint import Prediction
from tests.shapes import NF4, at


def record(configuration: Configuration, context: int, peak: float, **more: Any) -> Record:
    arguments = {"outcome": "ok", "peak_bytes": int(peak), "base_bytes": 500 * MIB} | more
    return Record(configuration, context, **arguments)


def test_without_records_the_default_stands():
    assert calibrate([], "cuda:0") == DEFAULT["cuda"]
    lost = record(NF4, 128, 1, outcome="out_of_memory")
    assert calibrate([(lost, Prediction({"base": 0}, 0, 0))], "cpu") == DEFAULT["cpu"]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bnb-nf4", "quanto-int4"]),
            st.sampled_from(CACHES),
            st.integers(64, 16_384),
            st.floats(0.85, 1.2),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_after_calibration_no_record_is_above_its_prediction(llama, seen):
    pairs = []
    for weights, cache, context, factor in seen:
        configuration = Configuration(weights=weights, cache=cache)
        said = at(llama, configuration, context)
        pairs.append((record(configuration, context, said.total * factor), said))
    learned = calibrate(pairs, "cuda:0")
    for measured, _ in pairs:
        said = at(llama, measured.configuration, measured.context_tokens, calibration=learned)
        assert said.total >= measured.peak_bytes


def test_one_high_record_among_many_is_still_covered(llama):
    pairs = [(record(NF4, n, at(llama, NF4, n).total), at(llama, NF4, n)) for n in range(100, 10_100, 100)]
    high = record(NF4, 5000, at(llama, NF4, 5000).total * 1.2)
    learned = calibrate([*pairs, (high, at(llama, NF4, 5000))], "cuda:0")
    assert at(llama, NF4, 5000, calibration=learned).total >= high.peak_bytes


def excess(said: Prediction, offset: float, share: float) -> float:
    """Beyond `said`: 110 MiB less for the base of `record`, `offset` MiB, and a share of cache and activations."""
    moving = sum(said.owners[owner] for owner in ("kv_cache", "draft_kv_cache", "activations"))
    return (offset - 110) * MIB + share * moving


def test_a_steady_excess_is_learned_and_its_error_is_that_of_unseen_records(llama):
    pairs = []
    for context in (128, 512, 2048, 4096, 8192):
        said = at(llama, NF4, context)
        pairs.append((record(NF4, context, said.total + excess(said, 50, 0.1)), said))
    learned = calibrate(pairs, "cuda:0")
    offset, above = learned.corrections["bnb-nf4 eager"]
    assert learned.base_bytes == 500 * MIB
    assert (offset / MIB, learned.share) == pytest.approx((50, 0.1), rel=1e-3)
    assert above == pytest.approx(SPREAD["cuda"], rel=1e-3)  # nothing but the room for the next record
    assert learned.error == pytest.approx(above, rel=1e-3)
    said = at(llama, NF4, 16_384)
    expected = (said.total + excess(said, 50, 0.1)) * (1 + above)
    assert at(llama, NF4, 16_384, calibration=learned).total == pytest.approx(expected, rel=1e-4)


def test_a_record_above_the_others_of_its_kind_raises_the_whole_kind_and_no_other(llama):
    int8 = NF4.replace(weights="quanto-int8")
    contexts = (1024, 2048, 4096, 8192)
    even = [(record(c, n, at(llama, c, n).total - 110 * MIB), at(llama, c, n)) for c in (NF4, int8) for n in contexts]
    high = [(record(NF4, 2048, at(llama, NF4, 2048).total * 1.04 - 110 * MIB), at(llama, NF4, 2048))]
    before, after = (calibrate(pairs, "cuda:0") for pairs in (even, even + high))
    ratios = {
        c.weights: at(llama, c, 4096, calibration=after).total / at(llama, c, 4096, calibration=before).total
        for c in (NF4, int8)
    }
    assert ratios["bnb-nf4"] == pytest.approx(1.04, rel=5e-3)
    assert ratios["quanto-int8"] == pytest.approx(1.0, rel=5e-3)


@pytest.mark.parametrize("more", [{"draft": "1b", "draft_weights": "bf16", "depth": 5}, {"launch": "graph"}])
def test_drafts_and_launches_are_corrected_apart(llama, draft, more):
    static = NF4.replace(cache="static")
    other = static.replace(**more)
    pairs = []
    for context in (128, 1024, 4096):
        for configuration, offset in ((static, 0), (other, 300)):
            said = at(llama, configuration, context, draft=draft)
            pairs.append((record(configuration, context, said.total + excess(said, offset, 0.0)), said))
    learned = calibrate(pairs, "cuda:0")
    for measured, _ in pairs:
        said = at(llama, measured.configuration, measured.context_tokens, calibration=learned, draft=draft)
        assert said.total == pytest.approx(measured.peak_bytes * (1 + SPREAD["cuda"]), rel=1e-4)


def test_kinds_share_a_slope_and_unseen_ones_take_what_is_known_of_their_weights(llama):
    pairs = []
    for weights, offset in (("bnb-nf4", 0), ("bf16", 400)):
        for context in (128, 2048, 8192)[: 1 if weights == "bf16" else 3]:
            configuration = Configuration(weights=weights)
            said = at(llama, configuration, context)
            pairs.append((record(configuration, context, said.total + excess(said, offset, 0.3)), said))
    learned = calibrate(pairs, "cuda:0")
    for configuration in (Configuration(), Configuration(cache="static", launch="graph")):
        said = at(llama, configuration, 16_384)
        expected = (said.total + excess(said, 400, 0.3)) * (1 + SPREAD["cuda"])
        assert at(llama, configuration, 16_384, calibration=learned).total == pytest.approx(expected, rel=1e-4)
    unseen = Configuration(weights="quanto-int4")
    least = at(llama, unseen, 16_384).total + excess(at(llama, unseen, 16_384), 0, 0.3)
    assert at(llama, unseen, 16_384, calibration=learned).total > least
