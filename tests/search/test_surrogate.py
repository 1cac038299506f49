"""What the search believes, against the textbook's formulas; no model, no torch."""

from __future__ import annotations

import math
import random
from itertools import islice

import numpy as np
import pytest

from autotune.config import Configuration
from autotune.search.space import read_space
from autotune.search.surrogate import Belief, Pool, below, footprint_belief, improvement, rate_belief

CONTEXTS = (128, 2048)
SPACE = read_space("default")
SOME = list(islice(SPACE.configurations(), 0, 4000, 173))


def believing(configurations: list[Configuration]) -> tuple[Pool, Belief]:
    pool, belief = Pool(CONTEXTS), rate_belief()
    pool.extend(configurations)
    belief.reset(pool, np.zeros(len(pool.pairs)))
    return pool, belief


def test_what_is_learnt_one_by_one_is_the_posterior_of_all() -> None:
    pool, belief = believing(SOME)
    covariance = np.array([belief._covariance(at) for at in range(len(pool.pairs))])
    assert np.allclose(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    assert belief.variance == pytest.approx(np.diag(covariance))
    at, values, spread = [3, 11, 20, 4], np.array([3.0, 4.0, 2.5, 3.1]), [0.0, 0.1, 0.0, 0.2]
    for where, value, own in zip(at, values, spread, strict=True):
        belief.observe(where, value, own)
    noise = np.diag([belief.noise**2 + own**2 for own in spread])
    gain = covariance[:, at] @ np.linalg.inv(covariance[np.ix_(at, at)] + noise)
    assert belief.mean == pytest.approx(gain @ values, abs=1e-6)
    posterior = covariance - gain @ covariance[at]
    assert belief.variance == pytest.approx(np.diag(posterior), abs=1e-6)
    first, second = np.arange(len(pool.pairs)), np.roll(np.arange(len(pool.pairs)), 7)
    assert belief.between(first, second) == pytest.approx(posterior[first, second], abs=1e-6)


def test_a_pool_that_grows_keeps_what_was_learnt() -> None:
    pool, belief = believing(SOME[:10])
    whole_pool, whole = believing(SOME)
    for at, value in ((0, 3.0), (7, 4.0)):
        belief.observe(at, value, 0.1)
        whole.observe(whole_pool.index[pool.pairs[at]], value, 0.1)
    pool.extend(SOME)
    belief.reset(pool, np.zeros(len(pool.pairs)))
    assert pool.pairs == whole_pool.pairs
    assert belief.mean == pytest.approx(whole.mean)
    assert belief.variance == pytest.approx(whole.variance)


def test_a_word_that_is_fast_at_one_context_is_expected_to_be_at_another() -> None:
    configurations = [
        Configuration(weights=weights, cache=cache)
        for weights in ("bf16", "bnb-nf4")
        for cache in ("dynamic", "static")
    ]
    pool, belief = believing(configurations)
    for configuration, rate in ((configurations[0], 30.0), (configurations[1], 60.0)):
        belief.observe(pool.index[configuration, 128], math.log(rate))
    belief.observe(pool.index[configurations[2], 2048], math.log(20.0))
    unseen = [belief.mean[pool.index[configuration, 2048]] for configuration in configurations]
    assert unseen[1] > unseen[0] + 0.2
    assert unseen[3] > unseen[2] + 0.2


def test_a_chunk_that_holds_the_whole_prompt_is_no_chunk() -> None:
    chunked = Configuration(prefill_chunk=2048)
    pool, belief = believing([Configuration(), chunked])
    for context in CONTEXTS:
        belief.observe(pool.index[Configuration(), context], 3.0)
    assert belief.variance[pool.index[chunked, 128]] == belief.variance[pool.index[Configuration(), 128]]
    chunked = Configuration(prefill_chunk=512)
    pool, belief = believing([Configuration(), chunked])
    belief.observe(pool.index[Configuration(), 2048], 3.0)
    assert belief.variance[pool.index[chunked, 2048]] > belief.variance[pool.index[Configuration(), 2048]] + 0.01


def test_a_draft_model_that_is_idle_is_as_none() -> None:
    used = Configuration(draft="/models/draft", draft_weights="bf16", depth=4)
    pool, belief = believing([Configuration(), used.replace(depth=0), used])
    none, idle, drafted = (pool.index[c, 128] for c in (Configuration(), used.replace(depth=0), used))
    belief.observe(none, 2.0)
    assert belief.mean[idle] == pytest.approx(belief.mean[none])
    assert belief.mean[drafted] < belief.mean[idle]
    assert belief.deviation[drafted] > belief.deviation[idle]
    held = footprint_belief()
    held.reset(pool, np.zeros(len(pool.pairs)))
    held.observe(drafted, 0.1)
    assert held.mean[idle] > held.mean[none]  # it takes memory all the same


@pytest.mark.parametrize("least", [-1.0, 0.2, 1.5])
def test_of_what_was_cut_off_is_known_that_it_lies_above(least: float) -> None:
    _, belief = believing(SOME[:4])
    mean, deviation = belief.mean[2], belief.deviation[2]
    draws = np.random.default_rng(0).normal(mean, deviation, 400_000)
    above = draws[draws > mean + least * deviation]
    belief.exceed(2, mean + least * deviation)
    assert belief.mean[2] == pytest.approx(above.mean(), rel=0.02)
    assert belief.deviation[2] == pytest.approx(above.std(), rel=0.02)
    belief.exceed(0, belief.mean[0] + 50 * belief.deviation[0])  # far out, where the tail is no number any more
    assert np.isfinite(belief.mean).all()


def test_the_distance_is_to_the_nearest() -> None:
    pool = Pool((128,))
    far = Configuration(cache="static", launch="graph")
    pool.extend([Configuration(), Configuration(cache="static"), far])
    assert list(pool.distance([Configuration()])) == [0, 1, 2]
    assert list(pool.distance([Configuration(), far])) == [0, 1, 0]
    assert list(pool.distance([])) == [0, 0, 0]


def test_the_expected_improvement_is_that_of_draws() -> None:
    draw = random.Random(0)
    draws = [draw.gauss(-0.1, 0.2) for _ in range(20000)]
    expected = sum(max(0.0, value) for value in draws) / len(draws)
    assert improvement(np.array([-0.1]), np.array([0.2]))[0] == pytest.approx(expected, rel=0.05)
    assert improvement(np.array([0.3]), np.array([0.0]))[0] == pytest.approx(0.3)
    assert below(np.array([-1.0, 0.0, 1.96])) == pytest.approx([0.1587, 0.5, 0.975], abs=3e-4)
