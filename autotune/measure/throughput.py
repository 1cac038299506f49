"""How fast a configuration runs: rounds over the same prompts until the interval of the median is narrow.

A round generates `new_tokens` after every prompt; its rate is all new tokens over all its time, so that a round is one
sample of the workload. Decoding one request is bound by reading every weight once per step, prefill by arithmetic; both
are taken from the same generation: time to first token, and the time from there to the last token.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config import Configuration, Record, median_error, per_round

if TYPE_CHECKING:  # what is timed needs only a `generate` that returns what a Generation holds
    from ..engine.decode import Engine, Generation

MAX_ROUNDS = 8
GOAL = 0.03  # relative half-width of the 95 % interval at which rounds end
DRIFT = 0.8  # rounds that fall below this share of the earlier ones and stay there are another rate, not noise
HOPELESS = 0.75  # share of the best known rate below which two rounds are enough
FAR = 0.65  # and below which one is
# Student's t, two-sided 95 %, for 2 to 7 degrees of freedom
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def measure_throughput(
    engine: Engine,
    configuration: Configuration,
    prompts: list[list[int]],
    new_tokens: int,
    *,
    min_rounds: int,
    limit_s: float,
    bar: float | None = None,
    on_round: Callable[[int], None] = lambda rounds: None,
) -> tuple[list[dict[str, Any]], list[Generation]]:
    """Raw samples of every timed generation, and the last round's generations. Warm-up is not among them.

    Rounds end early where they fall so far below `bar` (tokens/s) that this cannot be the fastest.
    """
    engine.generate(prompts[0], configuration, _warm_up_tokens(configuration, new_tokens, engine.device))
    samples: list[dict[str, Any]] = []
    began = time.perf_counter()
    for done in range(1, MAX_ROUNDS + 1):
        round_began = time.perf_counter()
        generations = [engine.generate(prompt, configuration, new_tokens) for prompt in prompts]
        samples += [_sample(done - 1, index, generation) for index, generation in enumerate(generations)]
        on_round(done)
        now = time.perf_counter()
        if bar is not None and hopeless(per_round(samples, "tokens_per_s"), bar):
            break
        if done >= min_rounds:
            _, low, high = rate_interval(samples, "tokens_per_s")
            middle = (low + high) / 2
            if (high - low) / 2 <= GOAL * middle or now - began + (now - round_began) > limit_s:
                break
    return samples, generations


def hopeless(rates: list[float], bar: float) -> bool:
    """Whether the rounds say that this is not the fastest; a single one may be a stall, so that it has to say more."""
    return max(rates) < (HOPELESS if len(rates) > 1 else FAR) * bar


def _warm_up_tokens(configuration: Configuration, new_tokens: int, device: str) -> int:
    """Enough for a few steps; where the depth adapts, for those in which each is tried.

    On a GPU the first request over a cache that grows is slower from end to end, as each of its steps needs memory of a
    size that the allocator has not had: there, all of it.
    """
    if configuration.cache == "dynamic" and device != "cpu":
        return new_tokens
    if configuration.speculation == "adaptive":
        return min(new_tokens, 3 * sum(depth + 1 for depth in configuration.depths))
    return min(new_tokens, 2 * configuration.depth + 4)


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The record's figures from raw samples: medians over rounds with 95 % intervals."""
    figures: dict[str, Any] = {}
    for name in ("tokens_per_s", "decode_tokens_per_s", "ttft_s"):
        figures[name], low, high = rate_interval(samples, name)
        figures[f"{name}_interval"] = (low, high) if math.isfinite(high) else None
    rates = per_round(samples, "tokens_per_s")
    figures["spread"] = statistics.stdev(rates) / statistics.median(rates) if len(rates) > 1 else 0.0
    figures["drift"] = drift(samples)
    proposed = sum(sample["proposed"] for sample in samples)
    verifications = sum(sample["verifications"] for sample in samples)
    if proposed:
        figures["acceptance"] = sum(sample["accepted"] for sample in samples) / proposed
        figures["mean_depth"] = proposed / sum(len(sample["step_s"]) for sample in samples)
        figures["tokens_per_verification"] = 1 + sum(sample["accepted"] for sample in samples) / verifications
    return figures


def pooled(first: Record, second: Record) -> Record:
    """Two measurements of the same thing as one: the second with the rounds of both, and the higher footprint."""
    after = 1 + max(sample["round"] for sample in first.samples)
    samples = [*first.samples, *({**sample, "round": sample["round"] + after} for sample in second.samples)]
    figures = summarize(samples)
    del figures["drift"]
    peak = max(record.peak_bytes or 0 for record in (first, second)) or None
    return dataclasses.replace(second, **figures, samples=tuple(samples), stage=first.stage, peak_bytes=peak)


def drift(samples: list[dict[str, Any]]) -> float:
    """The later rounds' rate over the earlier ones', where it fell at once, by more than either side varies; else 1.

    Of four rounds or more, at least two afterwards, and less than DRIFT: a lowered clock, not a stall or noise.
    """
    rates = per_round(samples, "tokens_per_s")
    ratios = [1.0]
    for at in range(1, len(rates) - 1 if len(rates) > 3 else 0):
        earlier, later = rates[:at], rates[at:]
        varied = max(max(side) - min(side) for side in (earlier, later))
        if min(earlier) - max(later) > varied:
            ratios.append(statistics.median(later) / statistics.median(earlier))
    return min(ratio if ratio < DRIFT else 1.0 for ratio in ratios)


def rate_interval(samples: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Median over rounds and its 95 % interval, by Student's t with the median's efficiency (sqrt(pi / 2))."""
    values = per_round(samples, name)
    middle = statistics.median(values)
    if len(values) < 2:
        return middle, 0.0, math.inf
    half = _T.get(len(values) - 1, 12.706) * median_error(values)
    return middle, max(0.0, middle - half), middle + half


def _sample(number: int, prompt: int, generation: Generation) -> dict[str, Any]:
    return {
        "round": number,
        "prompt": prompt,
        "new_tokens": len(generation.tokens),
        "ttft_s": round(generation.ttft_s, 6),
        "step_s": [round(seconds, 6) for seconds in generation.step_s],
        "step_tokens": generation.step_tokens,
        "proposed": generation.proposed,
        "accepted": generation.accepted,
        "verifications": generation.verifications,
    }
