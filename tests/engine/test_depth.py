"""The rule of an adaptive depth, with costs and acceptances that are planted: no model, no clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.config import Configuration
from autotune.engine.depth import PROBE, PROBE_DEPTH, TRIES, AdaptiveDepth

Cost = Callable[[int], float]


def linear(share: float) -> Cost:
    return lambda depth: 1 + share * depth


def rule_of(depth: int) -> AdaptiveDepth:
    return AdaptiveDepth(Configuration(draft="prompt-lookup", depth=depth, speculation="adaptive").depths)


def drive(rule: AdaptiveDepth, acceptance: float, cost: Cost, steps: int, seed: int = 0) -> list[int]:
    """The depths of so many steps, where each drafted token is accepted with this probability."""
    dice, depths = random.Random(seed), []
    for _ in range(steps):
        depth = rule.choose(16)
        accepted = next((i for i in range(depth) if dice.random() >= acceptance), depth)
        rule.observe(depth, accepted, cost(depth))
        depths.append(depth)
    return depths


def tokens_per_s(depth: int, acceptance: float, cost: Cost) -> float:
    tokens = depth + 1 if acceptance == 1 else (1 - acceptance ** (depth + 1)) / (1 - acceptance)
    return tokens / cost(depth)


@pytest.mark.parametrize(
    ("depth", "depths"), [(2, (0, 1, 2)), (3, (0, 1, 2, 3)), (8, (0, 1, 2, 4, 8)), (16, (0, 1, 2, 4, 8, 16))]
)
def test_few_depths_are_used_so_that_few_steps_are_recorded(depth: int, depths: tuple[int, ...]) -> None:
    assert Configuration(draft="a", depth=depth, speculation="adaptive").depths == depths
    assert Configuration(draft="a", depth=depth).depths == (depth,)


def test_every_depth_is_tried_the_largest_first() -> None:
    assert drive(rule_of(4), 0.5, linear(0.1), 4 * TRIES) == [4] * TRIES + [2] * TRIES + [1] * TRIES + [0] * TRIES


def test_what_is_always_rejected_is_drafted_no_more_but_for_a_probe_now_and_then() -> None:
    depths = drive(rule_of(8), 0.0, linear(0.1), 300)[50:]
    assert set(depths) == {0, PROBE_DEPTH}
    probes = [index for index, depth in enumerate(depths) if depth]
    assert {after - before for before, after in itertools.pairwise(probes)} == {PROBE + 1}


def test_what_is_always_accepted_is_drafted_to_the_full_depth() -> None:
    assert set(drive(rule_of(8), 1.0, linear(0.1), 100)[5 * TRIES :]) == {8}


def test_the_depth_follows_when_acceptance_changes() -> None:
    rule = rule_of(8)
    for _ in range(2):
        assert set(drive(rule, 1.0, linear(0.1), 200)[100:]) == {8}
        assert sorted(drive(rule, 0.0, linear(0.1), 200)[100:])[90] == 0


@settings(max_examples=40, derandomize=True)
@given(
    acceptance=st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9]),
    share=st.sampled_from([0.01, 0.05, 0.15, 0.3, 0.6]),
    seed=st.integers(0, 5),
)
def test_the_depths_come_near_the_best(acceptance: float, share: float, seed: int) -> None:
    cost = linear(share)
    depths = drive(rule_of(8), acceptance, cost, 600, seed)[50:]
    best = max(tokens_per_s(depth, acceptance, cost) for depth in (0, 1, 2, 4, 8))
    steps = sum(cost(depth) for depth in depths)
    tokens = sum(tokens_per_s(depth, acceptance, cost) * cost(depth) for depth in depths)
    assert tokens / steps > 0.9 * best


def test_a_depth_whose_step_costs_twice_as_much_is_avoided() -> None:
    """As where a product of 4-bit weights takes another kernel from some number of tokens on."""
    assert set(drive(rule_of(8), 0.8, lambda depth: 1.1 if depth < 4 else 2.5, 200)[50:]) <= {1, 2}
    assert set(drive(rule_of(8), 0.8, lambda depth: 1.0 + (depth > 0), 200)[50:]) == {8}


def test_the_first_step_of_a_depth_may_take_long_as_it_is_recorded() -> None:
    rule, seen = rule_of(4), set()
    for _ in range(60):
        depth = rule.choose(4)
        rule.observe(depth, depth, 1.0 + 0.1 * depth if depth in seen else 50.0)
        seen.add(depth)
    assert rule.choose(4) == 4


def test_one_slow_step_turns_nothing() -> None:
    rule = rule_of(4)
    drive(rule, 1.0, linear(0.1), 40)
    rule.observe(rule.choose(4), 4, 30.0)
    assert rule.choose(4) == 4


@settings(max_examples=100, derandomize=True)
@given(
    depth=st.integers(2, 16),
    steps=st.lists(st.tuples(st.integers(-1, 16), st.integers(0, 16), st.integers(0, 16)), max_size=80),
)
def test_no_more_is_asked_for_than_there_is_room_for(depth: int, steps: list[tuple[int, int, int]]) -> None:
    """However few tokens are proposed: prompt lookup may find fewer, or none."""
    rule = rule_of(depth)
    for limit, proposed, accepted in steps:
        chosen = rule.choose(limit)
        assert chosen in rule.depths
        assert chosen <= max(limit, 0)
        proposed = min(proposed, chosen)
        rule.observe(proposed, min(accepted, proposed), 1.0)
        assert 0 < rule.acceptance < 1


def test_what_was_not_proposed_says_nothing_of_acceptance() -> None:
    rule = rule_of(4)
    drive(rule, 1.0, linear(0.1), 60)
    before = rule.acceptance
    for _ in range(100):
        assert rule.choose(4) == 4
        rule.observe(0, 0, 1.0)
    assert rule.acceptance == before


def test_what_follows_a_rejected_token_says_nothing_of_acceptance() -> None:
    deep, shallow = rule_of(8), rule_of(8)
    deep.choose(8)
    deep.observe(8, 2, 1.0)
    for kept in (1, 1, 0):
        shallow.choose(1)
        shallow.observe(1, kept, 1.0)
    assert deep.acceptance == pytest.approx(shallow.acceptance, rel=0.05)
