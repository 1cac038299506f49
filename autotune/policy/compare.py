"""Whether one configuration is faster than another, by what was measured of both.

Welch's t on the logarithms of the rounds' rates; what counts as evidence, and what failed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

from ..config import Configuration, Objective, Record

# Share of the fastest's rate that another must reach in the finals, however wide the error, to be recommended in its
# place; chosen, not measured.
NEAR = 0.9


def as_done(records: Iterable[Record]) -> list[Record]:
    """The records with configurations as they were carried out: a prompt that fits its first chunk was read whole."""
    done = ((record, record.configuration.at(record.context_tokens)) for record in records)
    return [r if ours is r.configuration else dataclasses.replace(r, configuration=ours) for r, ours in done]


def near(ours: list[Record], theirs: list[Record], objective: Objective) -> bool:
    """Whether ours may be as fast as theirs: no slower than error explains, and by not much."""
    return may_match(speedup(ours, theirs, objective))


def may_match(compared: tuple[float, float, float]) -> bool:
    ratio, _, high = compared
    return ratio >= NEAR and high >= 1


def within(compared: tuple[float, float, float]) -> bool:
    """Whether a ratio is 1 within a known error."""
    _, low, high = compared
    return math.isfinite(high) and low <= 1 <= high


def soundly_again(records: list[Record], configuration: Configuration, context: int) -> bool:
    """Whether it was measured again in the finals at this context, and never failed there."""
    return any(r.configuration == configuration and r.stage == "final" for r in sound(records, context))


def sound(records: list[Record], context: int) -> list[Record]:
    """What was ok at this context and never failed there."""
    failed = broken(records, context)
    here = [record for record in records if record.outcome == "ok" and record.context_tokens == context]
    return [record for record in here if record.configuration not in failed]


def broken(records: Iterable[Record], context: int) -> set[Configuration]:
    """What failed at this context at least once. Too little time and too much noise are no failures of its own."""
    passing = ("ok", "timeout", "unstable")
    return {r.configuration for r in records if r.context_tokens == context and r.outcome not in passing}


def speedup(ours: list[Record], theirs: list[Record], objective: Objective) -> tuple[float, float, float]:
    """How many times faster, with a 95 % interval: Welch's t on the logarithms of the rounds' rates."""
    a, b = (log_rounds(records, objective) for records in (ours, theirs))
    return interval_of(statistics.median(a) - statistics.median(b), [(1, a), (1, b)])


def interval_of(gain: float, terms: list[tuple[float, list[float]]]) -> tuple[float, float, float]:
    """exp(gain) with a 95 % interval; a gain is made of the medians of the terms' values, times their factors."""
    if any(len(values) < 2 for _, values in terms):
        return math.exp(gain), 0.0, math.inf
    parts = [factor**2 * statistics.variance(values) / len(values) for factor, values in terms]
    error = math.sqrt(sum(parts))
    if error == 0:
        return math.exp(gain), math.exp(gain), math.exp(gain)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, (_, v) in zip(parts, terms, strict=True))
    half = t95(freedom) * error * math.sqrt(math.pi / 2)  # the median's efficiency
    return math.exp(gain), math.exp(gain - half), math.exp(gain + half)


def log_rounds(records: list[Record], objective: Objective) -> list[float]:
    """ln(rate) of every round of every record."""
    return [math.log(rate) for record in records for rate in record.round_rates(objective)]


def t95(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5).

    Below 3 degrees of freedom the expansion is too low: there the next lower whole number's value stands.
    """
    if freedom < 3:
        return 12.706 if freedom < 2 else 4.303
    z = statistics.NormalDist().inv_cdf(0.975)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def carried_out(choice: dict[int, Configuration]) -> dict[int, Configuration]:
    """Each as it is carried out at its context."""
    return {context: configuration.at(context) for context, configuration in choice.items()}


def compare(
    records: list[Record], ours: Configuration, theirs: Configuration | None, context: int, objective: Objective
) -> tuple[float, float, float]:
    if theirs is None:
        return math.inf, math.inf, math.inf
    if ours == theirs:
        return 1.0, 1.0, 1.0
    return speedup(evidence_of(records, ours, context), evidence_of(records, theirs, context), objective)


def evidence_of(records: list[Record], configuration: Configuration, context: int) -> list[Record]:
    """The records that a claim about a configuration rests on: the finals, else what the search measured."""
    here = [r for r in records if r.configuration == configuration and r.context_tokens == context and r.tokens_per_s]
    finals = [record for record in here if record.stage == "final" and record.outcome in ("ok", "quality_loss")]
    return finals or here
