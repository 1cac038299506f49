"""What is believed of the pairs that a search may measure: their rates, footprints and soundness.

Every (configuration, context) that is not known is weighed by what `surrogate` believes of it, from what was measured
here and in earlier runs. A space too large to be weighed whole is weighed in a sample that grows around the best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..config import Configuration, LoadGroup, Record, median_error
from .knowledge import LOADING, Knowledge, did_not_load
from .surrogate import Pool, below, footprint_belief, rate_belief, sound_belief

# Chosen, not measured beside others, where nothing else is said; sections are of benchmarks/LOG.md.
_POOL = 4000  # configurations up to which a space is weighed whole
_DRAWN = 1000  # configurations of a larger one that are drawn at a time
_CENTRES = 2  # of the fastest at a context whose neighbours are weighed as well
# ln(rate) that each knob which experience would set otherwise is expected to cost: 0.15 lost ("The search by
# expectation").
_UNLIKE = 0.08
# On a GPU, ln(rate) by which weights are expected to be slower than those that the space names before them, and the
# share of ln(bytes that a decode step reads) that is expected to be lost in ln(rate). What they gave is in "The search
# on a recorded sweep of the 8B"; other values are not on record.
_LATER, _BOUND = 0.05, 0.35
_SOUND = 0.9  # probability that a configuration is sound, before any is known
_EARLIER = {True: 0.1, False: 0.2}  # standard deviation of an earlier run's ln(rate): of the same model, of another
_SHIFT = 0.5  # standard deviation of what all of an earlier run may be off by together, in ln(rate)
_NEAR = 0.5  # octaves that the context of an earlier record may lie from one of this run's
# Standard error of a single round's ln(rate). In the sweeps of benchmarks/recorded rounds vary by 0.07 (8B, H200) and
# 0.04 (bundled pair, Xeon) in the median.
ONE_ROUND = 0.1


class Pairs:
    """The pool of (configuration, context) pairs, with what is believed of each; arrays are in its order."""

    def __init__(self, known: Knowledge):
        self.known = known
        self.contexts = list(known.workload.contexts)
        self.random = random.Random(known.seed)
        self.pool = Pool(self.contexts)
        self.rate, self.footprint, self.sound = rate_belief(), footprint_belief(), sound_belief()
        self.groups: dict[LoadGroup, int] = {}
        self.learnt: set[tuple[Configuration, int]] = set()
        self.resident: LoadGroup | None = None
        self.centres: set[Configuration] = set()
        self.relearnt = 0  # second looks
        self.room: Any = np.zeros(0)  # per pair: ln(budget / predicted)
        self.out: Any = np.zeros(0, bool)  # known, or ruled out by what is
        self.doubted: Any = np.zeros(0, bool)  # predicted, as far as is known, not to fit
        whole = list(islice(known.space.configurations(), _POOL + 1))
        self.whole = len(whole) <= _POOL
        self.extend(whole if self.whole else [*known.first, *self._drawn(_DRAWN)])
        if known.earlier:
            self._inform()

    def _inform(self) -> None:
        """Expect what earlier runs measured, each at the nearest of this run's contexts."""
        known = self.known
        self.extend(record.configuration for run in known.earlier for record in run.records)
        rates: list[list[tuple[int, float, float]]] = []
        peaks: list[tuple[int, float, float]] = []
        sound: list[tuple[int, float, float]] = []
        for run in known.earlier:
            rates.append([])
            for record in run.records:
                context = min(self.contexts, key=lambda c: abs(math.log2(c / record.context_tokens)))
                if abs(math.log2(context / record.context_tokens)) > _NEAR:
                    continue
                at = self.pool.index[record.configuration, context]
                if record.tokens_per_s and record.ttft_s and record.decode_tokens_per_s:
                    off = math.hypot(_EARLIER[run.same], record.spread or 0.0)
                    rates[-1].append((at, math.log(record.rate(known.workload.objective)), off))
                if run.same and record.peak_bytes and known.predicted is not None:
                    said = known.predicted(record.configuration, record.context_tokens)
                    peaks.append((at, math.log(record.peak_bytes / said), 0.01))
                if run.same and record.outcome in ("ok", "over_budget", "quality_loss", "unsupported"):
                    sound.append((at, float(record.outcome in ("ok", "over_budget")), 0.3))
        self.rate.inform(rates, _SHIFT)
        self.footprint.inform([peaks], 0.0)
        self.sound.inform([sound], 0.0)

    def _drawn(self, count: int) -> list[Configuration]:
        return [self.known.space.suggest(Drawn(self.random)) for _ in range(count)]

    def extend(self, configurations: Iterable[Configuration]) -> None:
        """Take configurations into the pool, with a draft model also idle; all that was learnt is learnt again."""
        known, before = self.known, len(self.pool.pairs)
        self.pool.extend(with_idle(configurations))
        pairs = self.pool.pairs
        if len(pairs) == before:
            return
        grown = len(pairs) - before
        self.context = np.array([self.contexts.index(context) for _, context in pairs])
        self.group = np.array([self.groups.setdefault(c.load_group, len(self.groups)) for c, _ in pairs])
        room = [0.0] * grown
        if known.predicted is not None:
            room = [math.log(known.budget.bytes / known.predicted(*pair)) for pair in pairs[before:]]
        self.room = np.concatenate([self.room, room])
        self.out = np.concatenate([self.out, np.zeros(grown, bool)])
        self.doubted = np.concatenate([self.doubted, np.zeros(grown, bool)])
        mean = -_UNLIKE * self.pool.distance(known.first)
        if known.step_bytes is not None:
            order = {word: rank for rank, word in enumerate(known.space.choices["weights"])}
            mean -= _LATER * np.array([order.get(c.weights, len(order)) for c, _ in pairs])
            mean -= _BOUND * np.log([known.step_bytes(*pair) for pair in pairs])
        self.rate.reset(self.pool, mean)
        self.footprint.reset(self.pool, np.zeros(len(pairs)))
        self.sound.reset(self.pool, np.full(len(pairs), _SOUND))

    def learn(self) -> None:
        """From every record that came since the last time."""
        known = self.known
        new = [pair for pair in known.known if pair not in self.learnt and pair[1] in self.contexts]
        self.extend(configuration for configuration, _ in new)
        for pair in new:
            self.learnt.add(pair)
            record, at = known.known[pair], self.pool.index[pair]
            self.out[at] = True
            if record.tokens_per_s is not None:
                rate = max(record.rate(known.workload.objective), 1e-9)
                self.rate.observe(at, math.log(rate), self.error(record))
                self.sound.observe(at, float(record.outcome in ("ok", "over_budget", "unstable")))
            elif record.outcome in ("unsupported", "crashed"):
                self.sound.observe(at, 0.0)
            if known.predicted is not None and record.peak_bytes:
                self.footprint.observe(at, math.log(record.peak_bytes / known.predicted(*pair)))
            elif known.predicted is not None and record.outcome == "out_of_memory":
                self.footprint.exceed(at, self.room[at])
            if did_not_load(record):
                self.out |= self.group == self.group[at]
            self.resident = None if record.reason.startswith(LOADING) else record.configuration.load_group
        for record in known.again[self.relearnt :]:
            pair = record.configuration, record.context_tokens
            if pair in self.learnt:
                rate = math.log(record.rate(known.workload.objective))
                self.rate.observe(self.pool.index[pair], rate, self.error(record))
                self.resident = record.configuration.load_group
        self.relearnt = len(known.again)
        if new:
            self.doubted[:] = False

    def error(self, record: Record) -> float:
        """The standard error of its ln(rate): that of a median over its rounds."""
        rates = record.round_rates(self.known.workload.objective)
        return median_error([math.log(rate) for rate in rates]) if len(rates) > 1 else ONE_ROUND

    def chance(self, configuration: Configuration, context: int) -> float:
        """The probability that it fits."""
        self.learn()
        self.extend([configuration])
        return float(self.chances()[self.pool.index[configuration, context]])

    def chances(self) -> Any:
        if self.known.predicted is None:
            return np.ones(len(self.pool.pairs))
        return below((self.room - self.footprint.mean) / self.footprint.deviation)

    def explore(self) -> None:
        """Bring what differs in one knob from the best of each context into the pool."""
        known = self.known
        for context in self.contexts:
            sound = [r for (_, at), r in known.known.items() if at == context and r.outcome == "ok"]
            for record in sorted(sound, key=lambda r: -r.rate(known.workload.objective))[:_CENTRES]:
                if record.configuration not in self.centres:
                    self.centres.add(record.configuration)
                    self.extend(known.space.neighbours(record.configuration))

    def more(self) -> bool:
        before = len(self.pool.pairs)
        self.extend(self._drawn(_DRAWN))
        return len(self.pool.pairs) > before


def with_idle(configurations: Iterable[Configuration]) -> Iterator[Configuration]:
    """Each of them, and with its draft model idle, where it has one."""
    for configuration in configurations:
        yield configuration
        if configuration.has_draft_model:
            yield configuration.replace(depth=0)


class Drawn:
    """Stands for an Optuna trial whose choices are drawn at random."""

    def __init__(self, draw: random.Random):
        self.draw = draw

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.draw.choice(choices)
