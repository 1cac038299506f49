from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.measure.quality import BLOCK, _interval, compare

TOKENS, VOCABULARY = 32, 8


def random_logits(seed: int, windows: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(TOKENS, VOCABULARY, generator=generator) for _ in range(windows)]


def random_tokens(seed: int, windows: int = 2) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (windows, TOKENS), generator=generator).tolist()


def logits_of(probabilities: list[float]) -> list[torch.Tensor]:
    """The same distribution at every token of one window."""
    return [torch.tensor(probabilities).log().repeat(TOKENS, 1)]


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_equal_logits_lose_nothing(seed: int) -> None:
    figures = compare(random_logits(seed), random_logits(seed), random_tokens(seed))
    assert figures["perplexity_ratio"] == 1
    assert figures["perplexity_ratio_interval"] == (1, 1)
    assert figures["kl_divergence"] == figures["kl_divergence_p99"] == 0
    assert figures["top1_agreement"] == 1
    assert figures["quality"]["reference_perplexity"] == figures["perplexity"]


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(-50, 50))
def test_logits_that_are_shifted_as_a_whole_are_the_same_distribution(seed: int, shift: float) -> None:
    logits = random_logits(seed)
    figures = compare([rows + shift for rows in logits], logits, random_tokens(seed))
    assert figures["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert figures["kl_divergence"] == pytest.approx(0, abs=1e-4)
    assert figures["top1_agreement"] == 1


def test_known_distributions_give_the_figures_of_paper_and_pencil() -> None:
    # the text is always token 0: the reference gives it 1/2, the configuration 1/4
    figures = compare(logits_of([0.25, 0.75]), logits_of([0.5, 0.5]), [[0] * TOKENS])
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["quality"]["reference_perplexity"] == pytest.approx(2)
    assert figures["perplexity_ratio"] == pytest.approx(2)
    assert figures["perplexity_ratio_interval"] == pytest.approx((2, 2))
    assert figures["kl_divergence"] == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_the_divergence_is_that_of_the_configuration_from_the_reference_and_not_the_reverse() -> None:
    figures = compare(logits_of([0.9, 0.1]), logits_of([0.6, 0.4]), [[0] * TOKENS])
    assert figures["kl_divergence"] == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(0.6 / 0.9)


def test_agreement_counts_the_tokens_where_both_would_say_the_same() -> None:
    own, theirs = logits_of([0.6, 0.4])[0], logits_of([0.7, 0.3])[0]
    own[: TOKENS // 4] = torch.tensor([0.4, 0.6]).log()
    figures = compare([own], [theirs], [[0] * TOKENS])
    assert figures["top1_agreement"] == pytest.approx(0.75)


def test_the_worst_tokens_show_in_the_divergence_of_one_in_a_hundred() -> None:
    logits = random_logits(0, windows=4)
    worse = [rows.clone() for rows in logits]
    worse[0][0] = -10 * worse[0][0]
    worse[3][5] = -10 * worse[3][5]
    figures = compare(worse, logits, random_tokens(0, windows=4))
    assert figures["kl_divergence_p99"] > 10 * figures["kl_divergence"]


def test_figures_are_over_all_windows() -> None:
    own = logits_of([0.25, 0.75]) + logits_of([0.5, 0.5])
    figures = compare(own, logits_of([0.5, 0.5]) * 2, [[0] * TOKENS] * 2)
    assert figures["perplexity_ratio"] == pytest.approx(math.sqrt(2))
    assert (figures["quality"]["tokens"], figures["quality"]["windows"]) == (2 * TOKENS, 2)


def test_windows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare(random_logits(0)[:1], random_logits(0), random_tokens(0))


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    logits = random_logits(3)
    half = [rows.bfloat16() for rows in logits]
    assert compare(half, [rows.float() for rows in half], random_tokens(3))["perplexity_ratio"] == 1


def test_logits_that_are_no_numbers_give_a_ratio_that_is_no_number() -> None:
    broken = [rows * math.nan for rows in random_logits(0)]
    assert math.isnan(compare(broken, random_logits(0), random_tokens(0))["perplexity_ratio"])


def copying(tokens: list[int], period: int, forgotten: set[int]) -> torch.Tensor:
    """Logits of a model that repeats what it read `period` tokens ago and knows nothing where its cache lost that."""
    rows = torch.zeros(len(tokens) - period, VOCABULARY)
    for at in range(period, len(tokens)):
        if at - period not in forgotten:
            rows[at - period, tokens[at - period]] = 6.0
    return rows


@pytest.mark.parametrize("lost", [4, 8, 16])
def test_a_cache_that_loses_tokens_shows_as_a_loss_of_quality(lost: int) -> None:
    pattern = random_tokens(1, windows=1)[0]
    text = pattern + pattern
    whole = copying(text, TOKENS, set())
    lossy = copying(text, TOKENS, set(range(10, 10 + lost)))
    figures = compare([lossy], [whole], [pattern])
    known = math.log(math.exp(6) / (math.exp(6) + VOCABULARY - 1))
    expected = math.exp(lost / TOKENS * (known + math.log(VOCABULARY)))  # what was lost is guessed at 1 in 8
    assert figures["perplexity_ratio"] == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity_ratio"] > 1.2
    assert figures["kl_divergence"] > 0.1


def correlated(generator: np.random.Generator, windows: int, tokens: int, memory: float) -> np.ndarray:
    """Differences of loss with mean 0.02 and deviation 0.1, each remembering its neighbour (a stationary AR(1))."""
    rows = np.empty((windows, tokens))
    rows[:, 0] = generator.normal(size=windows)
    for at in range(1, tokens):
        rows[:, at] = memory * rows[:, at - 1] + math.sqrt(1 - memory**2) * generator.normal(size=windows)
    return 0.02 + 0.1 * rows


@pytest.mark.parametrize(("windows", "least"), [(4, 0.89), (2, 0.86)])
def test_the_interval_holds_the_truth_at_about_the_right_rate(windows: int, least: float) -> None:
    generator, times = np.random.default_rng(0), 400
    held = 0
    for _ in range(times):
        low, high = _interval(correlated(generator, windows, 128, memory=0.5), draws=400)
        held += low <= 0.02 <= high
    assert least <= held / times <= 0.99


def test_the_interval_narrows_with_more_text() -> None:
    generator = np.random.default_rng(0)
    widths = [np.subtract(*reversed(_interval(correlated(generator, windows, 128, 0.5)))) for windows in (2, 8, 32)]
    assert widths[0] > 1.4 * widths[1] > 2 * widths[2]


def test_the_interval_of_correlated_tokens_is_wider_than_that_of_independent_ones() -> None:
    values = correlated(np.random.default_rng(0), 8, 128, memory=0.8)
    shuffled = np.random.default_rng(1).permutation(values.ravel()).reshape(values.shape)
    low, high = _interval(values)
    low_shuffled, high_shuffled = _interval(shuffled)
    assert high - low > 1.5 * (high_shuffled - low_shuffled)


def test_the_same_figures_come_out_every_time() -> None:
    values = correlated(np.random.default_rng(0), 2, 128, memory=0.5)
    assert _interval(values) == _interval(values)


def test_the_scored_text_fills_a_bootstrap_block() -> None:
    from autotune.measure.inputs import SCORED

    assert SCORED >= 8 * BLOCK
