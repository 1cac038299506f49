"""How fast a configuration runs: rounds over the same prompts until the interval of the median is narrow.

A round generates `new_tokens` after every prompt; its rate is all new tokens over all its time, so that a round is one
sample of the workload. Decoding one request is bound by reading every weight once per step, prefill by arithmetic; both
are taken from the same generation: time to first token, and the time from there to the last token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config import Configuration, per_round
from ..samples import rate_interval

if TYPE_CHECKING:  # what is timed needs only a `generate` that returns what a Generation holds
    from ..engine.decode import Engine, Generation

MAX_ROUNDS = 8  # rounds of a measurement; chosen, not measured
GOAL = 0.03  # relative half-width of the 95 % interval at which rounds end; chosen, not measured
# Shares of the best known rate below which two rounds are enough, and below which one is; the first was chosen. With
# the second at 0.65 the 10th percentile of searches under 854 MiB was 100 % of the best, with 0.5, 0.6 and 0.75 it was
# 97.2 (benchmarks/LOG.md, "Second looks").
HOPELESS, FAR = 0.75, 0.65


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
