from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import Budget, Configuration, Workload
from autotune.engine.decode import Generation
from autotune.measure.throughput import MAX_ROUNDS, measure_throughput
from autotune.samples import DRIFT, drift, pooled, rate_interval, summarize
from autotune.trial.trials import Trials
from tests.records import synthetic_record

PLAIN = Configuration()
MIN_ROUNDS = 3
PROMPTS = [[1, 2, 3], [4, 5]]


class FakeEngine:
    """Generates at the given rates (tokens/s), one a call after the warm-up, a quarter of it before the first token."""

    def __init__(self, rates: Iterator[float], device: str = "cpu"):
        self.rates, self.device = rates, device
        self.calls: list[tuple[list[int], int]] = []

    def generate(self, prompt: list[int], configuration: Configuration, new_tokens: int) -> Generation:
        self.calls.append((prompt, new_tokens))
        seconds = new_tokens / (next(self.rates) if len(self.calls) > 1 else 0.001)
        return Generation([7] * new_tokens, seconds / 4, [seconds * 0.75 / (new_tokens - 1)] * (new_tokens - 1))


def measured(
    rates: Iterator[float], configuration: Configuration = PLAIN, device: str = "cpu", **options: Any
) -> tuple[Any, FakeEngine]:
    engine = FakeEngine(rates, device)
    options = {"limit_s": 60.0, "min_rounds": MIN_ROUNDS} | options
    return measure_throughput(engine, configuration, PROMPTS, 20, **options)[0], engine  # type: ignore[arg-type]


def sample(number: int, ttft_s: float, step_s: list[float], new_tokens: int, **counts: int) -> dict[str, Any]:
    zero = {"proposed": 0, "accepted": 0, "verifications": 0}
    return {"round": number, "ttft_s": ttft_s, "step_s": step_s, "new_tokens": new_tokens, **zero, **counts}


def test_a_steady_configuration_takes_the_fewest_rounds_and_the_warm_up_is_not_counted() -> None:
    samples, engine = measured(itertools.repeat(50.0))
    assert len(samples) == MIN_ROUNDS * len(PROMPTS)
    assert len(engine.calls) == 1 + len(samples)
    assert summarize(samples)["tokens_per_s"] == pytest.approx(50, rel=1e-3)


def test_the_warm_up_is_short_and_exercises_the_draft() -> None:
    _, engine = measured(itertools.repeat(50.0), Configuration(draft="prompt-lookup", depth=5))
    assert engine.calls[0] == (PROMPTS[0], 14)
    _, engine = measured(itertools.repeat(50.0), Configuration(draft="prompt-lookup", depth=2, speculation="adaptive"))
    assert engine.calls[0] == (PROMPTS[0], 18)  # three times each of 1, 2 and 3 tokens
    assert all(new_tokens == 20 for _, new_tokens in engine.calls[1:])


@pytest.mark.parametrize(
    ("cache", "device", "tokens"), [("dynamic", "cuda:0", 20), ("static", "cuda:0", 4), ("dynamic", "cpu", 4)]
)
def test_on_a_gpu_the_warm_up_takes_a_cache_that_grows_through_all_its_sizes(
    cache: str, device: str, tokens: int
) -> None:
    _, engine = measured(itertools.repeat(50.0), Configuration(cache=cache), device)
    assert engine.calls[0] == (PROMPTS[0], tokens)


def test_every_round_runs_every_prompt() -> None:
    samples, engine = measured(itertools.repeat(50.0))
    assert [prompt for prompt, _ in engine.calls[1:]] == PROMPTS * MIN_ROUNDS
    assert [(s["round"], s["prompt"]) for s in samples] == list(itertools.product(range(MIN_ROUNDS), range(2)))


def test_noise_is_answered_with_more_rounds_up_to_a_limit() -> None:
    samples, _ = measured(itertools.cycle([20.0, 20.0, 60.0, 60.0]))
    assert len(samples) == MAX_ROUNDS * len(PROMPTS)


def test_noise_is_not_answered_past_the_time_limit() -> None:
    samples, _ = measured(itertools.cycle([20.0, 20.0, 60.0, 60.0]), limit_s=0.0)
    assert len(samples) == MIN_ROUNDS * len(PROMPTS)


@pytest.mark.parametrize(
    ("rates", "rounds"), [((60.0, 99.0), 1), ((70.0, 70.0), 2), ((74.5, 75.5), MIN_ROUNDS), ((80.0, 80.0), MIN_ROUNDS)]
)
def test_what_cannot_be_the_fastest_gets_a_round_or_two(rates: tuple[float, float], rounds: int) -> None:
    first, later = ([rate] * len(PROMPTS) for rate in rates)
    samples, _ = measured(itertools.chain(first, itertools.cycle(later)), bar=100.0)
    assert len(samples) == rounds * len(PROMPTS)


def test_two_measurements_of_the_same_thing_are_one_with_the_rounds_of_both() -> None:
    first = synthetic_record(PLAIN, 64, (100.0, 110.0), stage="baseline", peak=7)
    second = synthetic_record(PLAIN, 64, (120.0, 130.0, 140.0), peak=5, load_s=9.0)
    both = pooled(first, second)
    assert both.round_rates("end-to-end") == pytest.approx([100, 110, 120, 130, 140])
    assert both.tokens_per_s == pytest.approx(120)
    assert both.spread == pytest.approx(15.81 / 120, rel=1e-3)
    assert (both.stage, both.peak_bytes, both.load_s) == ("baseline", 7, 9.0)
    assert len(pooled(both, second).round_rates("end-to-end")) == 8


def test_a_watcher_hears_of_every_round() -> None:
    heard: list[int] = []
    measured(itertools.repeat(50.0), on_round=heard.append)
    assert heard == [1, 2, 3]


def test_rates_are_all_tokens_over_all_time_of_a_round() -> None:
    # the first prompt: 5 tokens in 1 + 4 s; the second: 11 tokens in 3 + 2 s: 16 tokens in 10 s, of which 6 s decode 14
    samples = [sample(0, 1.0, [1.0] * 4, 5), sample(0, 3.0, [0.2] * 10, 11)]
    figures = summarize(samples)
    assert figures["tokens_per_s"] == pytest.approx(1.6)
    assert figures["decode_tokens_per_s"] == pytest.approx(14 / 6)
    assert figures["ttft_s"] == pytest.approx(2.0)


def test_figures_are_medians_over_rounds() -> None:
    samples = [sample(number, 1.0, [seconds], 2) for number, seconds in enumerate([1.0, 9.0, 3.0])]
    assert summarize(samples)["tokens_per_s"] == pytest.approx(2 / 4)


def test_the_interval_is_students_t_with_the_efficiency_of_the_median() -> None:
    samples = [sample(number, 1.0, [], rate) for number, rate in enumerate([9, 10, 12])]
    middle, low, high = rate_interval(samples, "tokens_per_s")
    # deviation of 9, 10, 12 is 1.5275; over the root of 3 is 0.8819; times 1.2533 is 1.1053; times 4.303 is 4.756
    assert (middle, low, high) == pytest.approx((10, 10 - 4.756, 10 + 4.756), abs=0.001)


def test_an_interval_never_goes_below_nothing() -> None:
    samples = [sample(number, 1.0, [], rate) for number, rate in enumerate([1, 10, 30])]
    assert rate_interval(samples, "tokens_per_s")[1] == 0


def test_one_round_has_a_rate_and_no_interval() -> None:
    figures = summarize([sample(0, 1.0, [1.0], 4)])
    assert figures["tokens_per_s"] == pytest.approx(2)
    assert figures["tokens_per_s_interval"] is figures["ttft_s_interval"] is None


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=MAX_ROUNDS))
def test_the_interval_holds_the_median(rates: list[int]) -> None:
    samples = [sample(number, 1.0, [], rate) for number, rate in enumerate(rates)]
    middle, low, high = rate_interval(samples, "tokens_per_s")
    assert middle == statistics.median(rates)
    assert low <= middle <= high


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_the_interval_holds_the_true_rate_at_least_as_often_as_it_says(rounds: int) -> None:
    dice, times = random.Random(0), 1000
    held = 0
    for _ in range(times):
        samples = [sample(number, 100 / dice.gauss(50, 2), [], 100) for number in range(rounds)]
        _, low, high = rate_interval(samples, "tokens_per_s")
        held += low <= 50 <= high
    assert 0.95 <= held / times < 1


def test_acceptance_is_accepted_over_proposed_and_a_verification_adds_one_token() -> None:
    samples = [
        sample(0, 1.0, [1.0], 9, proposed=12, accepted=6, verifications=3),
        sample(1, 1.0, [1.0], 9, proposed=8, accepted=4, verifications=2),
    ]
    figures = summarize(samples)
    assert figures["acceptance"] == pytest.approx(10 / 20)
    assert figures["tokens_per_verification"] == pytest.approx(1 + 10 / 5)


def test_the_mean_depth_counts_steps_without_speculation() -> None:
    samples = [
        sample(0, 1.0, [1.0] * 4, 9, proposed=12, accepted=6, verifications=3),
        sample(1, 1.0, [1.0] * 6, 9, proposed=8, accepted=4, verifications=2),
    ]
    assert summarize(samples)["mean_depth"] == pytest.approx(20 / 10)


def test_what_nothing_was_proposed_for_has_no_acceptance() -> None:
    assert "acceptance" not in summarize([sample(0, 1.0, [1.0], 4)])


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([90, 90, 60, 60], 60 / 90),  # a third less, halfway
        ([90, 91, 89, 60, 61, 59, 60], 60 / 90),
        ([90, 90, 90, 60, 60], 60 / 90),
        ([90, 90, 74, 73], 1),  # by less than a fifth
        ([90, 60, 90, 60], 1),  # up and down is noise
        ([90, 90, 60, 60, 90], 1),  # a stall that passes
        ([90, 90, 90, 60], 1),  # one slow round at the end may be a stall
        ([60, 60, 90, 90], 1),  # faster: the first rounds warmed it up
        ([90, 60, 61, 59], 60 / 90),  # after the first round
        ([90, 60, 70, 50], 1),  # the later ones vary by as much as they fell
        ([90, 60, 60], 1),
        ([90, 60], 1),
        ([90], 1),
    ],
)
def test_a_rate_that_falls_halfway_and_stays_there_is_a_drift(rates: list[int], expected: float) -> None:
    samples = [sample(number, 1.0, [], rate) for number, rate in enumerate(rates)]
    assert drift(samples) == pytest.approx(expected, rel=0.02)
    assert summarize(samples)["drift"] == drift(samples)


def test_noise_of_a_few_percent_is_no_drift() -> None:
    dice = random.Random(0)
    for rounds in range(1, MAX_ROUNDS + 1):
        for _ in range(200):
            samples = [sample(number, 1.0, [], int(dice.gauss(1000, 50))) for number in range(rounds)]
            assert drift(samples) == 1 > DRIFT


@pytest.mark.parametrize(
    ("machine", "drift", "outcome", "reason"),
    [
        ({"waiting": 0.25}, 1.0, "ok", ""),
        (
            {"waiting": 0.4, "after": {"load_1m": 3.21}},
            0.5,
            "unstable",
            "100.0 tokens/s, but the processors were busy with something else: "
            "this process waited 40% of its time for one (load 3.2)",
        ),
        ({"after": {"others_share": None}}, 1.0, "ok", ""),
        ({"after": {"others_share": 0.25}}, 1.0, "ok", ""),
        (
            {"after": {"others_share": 0.6}},
            1.0,
            "unstable",
            "100.0 tokens/s, but the GPU was busy with something else: other processes used 60% of its time",
        ),
        (
            {"waiting": 0.0},
            0.67,
            "unstable",
            "100.0 tokens/s, but halfway its rounds fell by 33% and stayed there: was the clock lowered?",
        ),
        (
            {"before": {"sm_clock_mhz": 1980}, "after": {"sm_clock_mhz": 1320}},
            0.67,
            "unstable",
            "100.0 tokens/s, but halfway its rounds fell by 33% and stayed there: was the clock lowered? "
            "The GPU's went from 1980 to 1320 MHz.",
        ),
    ],
)
def test_what_else_the_machine_did_is_the_reason(
    tmp_path: Path, machine: dict[str, Any], drift: float, outcome: str, reason: str
) -> None:
    figures = {"peak_bytes": 1000, "tokens_per_s": 100.0, "spread": 0.01, "perplexity_ratio": 1.0, "machine": machine}
    assert Trials("model", Workload(), Budget(1000), tmp_path)._judge(figures, "", drift) == (outcome, reason)


@pytest.mark.parametrize(("spread", "outcome"), [(0.0, "ok"), (0.5, "ok"), (0.51, "unstable")])
def test_a_rate_whose_rounds_vary_by_more_than_half_is_unstable(tmp_path: Path, spread: float, outcome: str) -> None:
    judge = Trials("model", Workload(), Budget(1000), tmp_path)._judge
    figures = {"peak_bytes": 1000, "tokens_per_s": 100.0, "spread": spread, "perplexity_ratio": 1.0}
    assert judge(figures, "")[0] == outcome


@pytest.mark.parametrize(
    ("changes", "wrong", "outcome"),
    [
        ({"peak_bytes": 1001, "perplexity_ratio": 9.0}, "it lies", "over_budget"),
        ({"perplexity_ratio": 9.0}, "it lies", "wrong_output"),
        ({"perplexity_ratio": 1.051}, "", "quality_loss"),
        ({"perplexity_ratio": float("nan")}, "", "quality_loss"),
        ({"perplexity_ratio": 1.049}, "", "ok"),
        ({"perplexity_ratio": None}, "", "ok"),
    ],
)
def test_the_gravest_failure_is_the_outcome(tmp_path: Path, changes: dict[str, Any], wrong: str, outcome: str) -> None:
    figures = {"peak_bytes": 1000, "tokens_per_s": 100.0, "spread": 0.01, "perplexity_ratio": 1.0}
    judged, reason = Trials("model", Workload(), Budget(1000), tmp_path)._judge(figures | changes, wrong)
    assert judged == outcome
    assert (reason == "") == (outcome == "ok")
