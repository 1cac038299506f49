"""What the search believes of configurations that it has not measured, at every context, from those that it has.

Three Gaussian processes over (configuration, context) pairs: of the logarithm of the rate, of the logarithm of the
peak over its prediction, and of whether the answer is sound. Each knob's word has an effect of its own, which changes
slowly with the context, and the whole configuration another one for what words do together: an additive kernel
(Duvenaud et al., arXiv:1112.4394) plus a product one. Pairs are a finite pool, so that a record is learnt by one update
of every pair's mean and variance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import Configuration

Pair = tuple[Configuration, int]
Floats = Any  # a numpy array of float64

_KNOBS = tuple(field.name for field in dataclasses.fields(Configuration))
_DEPTH = _KNOBS.index("depth")
# Lengths over which likeness falls to 1 / e; both chosen, not measured.
_DEPTHS = 4.0  # tokens of depth
_OCTAVES = 4.0  # doublings of the context


@dataclasses.dataclass
class Belief:
    """A Gaussian process: standard deviations before anything is known, then what was observed."""

    everywhere: float  # of what all pairs have in common
    by_context: float  # of what all configurations at a context have in common
    by_knob: Mapping[str, float]  # of a word's effect
    together: float  # of what words do together
    noise: float
    fading: float = 0.4  # share of an effect's variance that is lost over many octaves
    resident: bool = False  # whether a draft model that is idle has its effect
    observed: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    shifted: float = 0.0  # by which all may lie above or below what is observed from now on
    rows: list[Floats] = dataclasses.field(default_factory=list)
    earlier: tuple[Sequence[Sequence[tuple[int, float, float]]], float] | None = None

    def reset(self, pool: Pool, mean: Floats) -> None:
        """Begin again with a pool that has grown; what was observed stays."""
        self.pool, self.mean = pool, mean.copy()
        weights = [self.by_knob.get(knob, 0.0) ** 2 for knob in _KNOBS]
        self.weights = np.array(weights)
        whole = self.everywhere**2 + self.by_context**2 + sum(weights) + self.together**2
        self.variance = np.full(len(mean), whole)
        observed, self.observed, self.rows, self.shifted = self.observed, [], [], 0.0
        if self.earlier is not None:
            self._inform(*self.earlier)
        for at, value, spread in observed:
            self.observe(at, value, spread)

    def inform(self, runs: Sequence[Sequence[tuple[int, float, float]]], shift: float) -> None:
        """Before anything is observed: what earlier runs observed, each of which may be off by as much everywhere.

        Each is moved by the median of what it differs by from those before it. `shift` is the standard deviation of
        what this run may differ by.
        """
        self.earlier = runs, shift
        self._inform(runs, shift)

    def _inform(self, runs: Sequence[Sequence[tuple[int, float, float]]], shift: float) -> None:
        for run in runs:
            off = statistics.median(value - self.mean[at] for at, value, _ in run) if self.observed and run else 0.0
            for at, value, spread in run:
                self.observe(at, value - off, spread)
        self.observed, self.shifted = [], shift
        self.variance = self.variance + shift**2

    def observe(self, at: int, value: float, spread: float = 0.0) -> None:
        """The posterior of every pair after one more, whose own standard deviation comes on top of the noise."""
        row = self._covariance(at)
        for other in self.rows:
            row -= other[at] * other
        scale = math.sqrt(max(row[at], 0.0) + self.noise**2 + spread**2)
        row /= scale
        self.mean += row * ((value - self.mean[at]) / scale)
        self.variance = np.maximum(self.variance - row**2, 1e-12)
        self.rows.append(row)
        self.observed.append((at, value, spread))

    def exceed(self, at: int, least: float) -> None:
        """The posterior after a value of which is known only that it lies above `least`.

        What is observed instead is what leaves this pair the mean and variance of the truncated normal distribution.
        """
        mean, deviation = self.mean[at], math.sqrt(self.variance[at])
        z = (least - mean) / deviation
        tail = math.erfc(z / math.sqrt(2)) / 2
        hazard = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / tail if tail > 1e-12 else z + 1 / max(z, 1.0)
        left = max(1 - hazard * (hazard - z), 1e-3)  # of the variance
        noise = deviation**2 * left / max(1 - left, 1e-9)
        value = mean + deviation * hazard / max(1 - left, 1e-9)
        self.observe(at, value, math.sqrt(max(noise - self.noise**2, 0.0)))

    def _covariance(self, at: int) -> Floats:
        return self._prior(*self.pool.alike(at, self.resident))

    def _prior(self, alike: Floats, near: Floats) -> Floats:
        effects = alike @ self.weights + self.together**2 * np.exp(-1.0 * (1 - alike).sum(axis=-1))
        common = self.everywhere**2 + self.shifted**2
        return common + self.by_context**2 * near + effects * (1 - self.fading * (1 - near))

    def between(self, first: Floats, second: Floats) -> Floats:
        """The posterior covariance of pairs, given by two arrays of indices of one shape."""
        alike, near = self.pool.alike(first, self.resident, second)
        rows = np.array(self.rows).reshape(len(self.rows), -1)
        return self._prior(alike, near) - np.einsum("r...,r...->...", rows[:, first], rows[:, second])

    @property
    def deviation(self) -> Floats:
        return np.sqrt(self.variance)


class Pool:
    """The pairs that are weighed, in the order in which they came."""

    def __init__(self, contexts: Sequence[int]):
        self.contexts = tuple(contexts)
        self.pairs: list[Pair] = []
        self.index: dict[Pair, int] = {}
        self._codes: list[list[list[float]]] = []
        self._words: dict[Any, int] = {}

    def extend(self, configurations: Iterable[Configuration]) -> None:
        for configuration in configurations:
            for context in self.contexts:
                if (configuration, context) not in self.index:
                    self.index[configuration, context] = len(self.pairs)
                    self.pairs.append((configuration, context))
                    self._codes.append([self._code(configuration, context, resident) for resident in (False, True)])
        self.codes = np.array(self._codes)  # pairs x (as it decodes, as it is held) x knobs
        self.octave = np.log2([context for _, context in self.pairs])

    def _code(self, configuration: Configuration, context: int, resident: bool) -> list[float]:
        """A number for each word that has an effect here. One that is idle has none unless it is `resident`."""
        done = configuration.at(context)
        idle = {} if done.depth or resident else {"draft": "none", "draft_weights": "none"}
        words = [idle.get(knob, getattr(done, knob)) for knob in _KNOBS]
        codes = [float(self._words.setdefault(word, len(self._words))) for word in words]
        codes[_DEPTH] = configuration.depth
        return codes

    def alike(self, at: Any, resident: bool = False, others: Any = slice(None)) -> tuple[Floats, Floats]:
        """How alike the words of pairs are (... x knobs, 0 to 1), and their contexts; `others`: all, or indices."""
        codes = self.codes[:, int(resident)]
        alike = (codes[others] == codes[at]).astype(float)
        alike[..., _DEPTH] = np.exp(-np.abs(codes[others, _DEPTH] - codes[at, _DEPTH]) / _DEPTHS)
        return alike, np.exp(-np.abs(self.octave[others] - self.octave[at]) / _OCTAVES)

    def distance(self, configurations: Iterable[Configuration]) -> Floats:
        """In how many knobs each pair differs from the nearest of these; 0 where there are none."""
        least: Floats = None
        for configuration in configurations:
            codes = np.array([self._code(configuration, context, False) for context in self.contexts])
            number = dict(zip(self.contexts, codes, strict=True))
            theirs = np.array([number[context] for _, context in self.pairs])
            far = (self.codes[:, 0] != theirs).sum(axis=1)
            least = far if least is None else np.minimum(least, far)
        return np.zeros(len(self.pairs)) if least is None else least.astype(float)


def rate_belief() -> Belief:
    """Of ln(rate): launches and drafts change it by half, where embeddings are held hardly."""
    strong = dict.fromkeys(("weights", "draft", "cache", "launch", "attention"), 0.35)
    weak = {"lm_head": 0.1, "embeddings": 0.05, "draft_weights": 0.15, "depth": 0.15, "prefill_chunk": 0.1}
    return Belief(5.0, 1.0, strong | weak, 0.15, 0.03)


def footprint_belief() -> Belief:
    """Of ln(peak / predicted): by 3 % for all, by 2 % for a word."""
    return Belief(0.03, 0.0, dict.fromkeys(_KNOBS, 0.02) | {"depth": 0.005}, 0.01, 0.004, resident=True)


def sound_belief() -> Belief:
    """Of 1 for an answer that is sound and 0 for one that is not."""
    return Belief(0.1, 0.0, {"weights": 0.2, "cache": 0.25, "lm_head": 0.1, "attention": 0.1}, 0.2, 0.05, fading=0.1)


def below(values: Floats) -> Floats:
    """The standard normal distribution, by its logistic approximation (Bowling et al. 2009; off by 0.0001)."""
    values = np.clip(values, -8, 8)
    return 1 / (1 + np.exp(-(0.07056 * values**3 + 1.5976 * values)))


def improvement(gain: Floats, deviation: Floats) -> Floats:
    """The expected improvement of a normal variable over 0."""
    deviation = np.maximum(deviation, 1e-9)
    z = gain / deviation
    return np.maximum(gain * below(z) + deviation * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), 0.0)
