"""What a search expects of the pairs that it may measure, and which of them is worth a look next.

Every (configuration, context) that is not known is weighed by what `surrogate` believes of its rate, its footprint and
its soundness: the gain that it can be expected to bring to the policy, a load group at every context, times the
probability that it is feasible, over the seconds that a look takes, its part of the load included. The load group that
promises most is first measured at every context that it can serve. A space too large to be weighed whole is weighed in
a sample that grows around the best. What was measured is measured again only where its error leaves the choice open:
then a second look is weighed like a first one, by what it may change.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Configuration, LoadGroup, Record, median_error
from .surrogate import Pool, below, footprint_belief, improvement, rate_belief, sound_belief

if TYPE_CHECKING:
    from .study import Search

TOO_LARGE = ("over_budget", "out_of_memory")
_LOADING = "while loading"  # how the reason of a record starts whose load group could not be loaded
_POOL = 4000  # configurations up to which a space is weighed whole
_DRAWN = 1000  # configurations of a larger one that are drawn at a time
_CENTRES = 2  # of the fastest at a context whose neighbours are weighed as well
_UNLIKE = 0.08  # ln(rate) that each knob which experience would set otherwise is expected to cost
_LATER = 0.05  # ln(rate) by which weights are expected to be slower than those that the space names before them
_BOUND = 0.35  # of ln(bytes that a decode step reads) is expected to be lost in ln(rate)
_SOUND = 0.9  # of the configurations, before any is known
_UNCOVERED = 2.0  # ln(rate) below the worst, which a context that a load group does not serve counts as
_POSSIBLE = 0.1  # probability of being feasible below which a load group does not hope to serve a context
_RISK = 0.1  # of the looks may go over the budget
_CREDIT = 0.5  # of one that does, to begin with
_LIKELY = 0.5  # probability of being feasible below which nothing is hoped for from what else a look tells
_EARLIER = {True: 0.1, False: 0.2}  # by which ln(rate) of an earlier run may be off; for another model: more
_SHIFT = 0.5  # by which all of it may be
_NEAR = 0.5  # octaves between its context and one of this run's
_ONE_ROUND = 0.1  # standard error of a single round's ln(rate)
_LOOKS = 3  # at the same pair, the most; the finals look at what is chosen again
_DOUBT = 0.0003  # of the policy's ln(rate), the least for which something is looked at again
_OUTCOMES = 15  # of a look, which stand for what it may say
_SHARED = 2.0  # of a load, in looks at every context, is laid on the look that begins it


class Outlook:
    """What the search expects of the pairs that it may measure, from those that it knows."""

    def __init__(self, search: Search):
        self.search = search
        self.contexts = list(search.workload.contexts)
        self.random = random.Random(search.seed)
        self.pool = Pool(self.contexts)
        self.rate, self.footprint, self.sound = rate_belief(), footprint_belief(), sound_belief()
        self.groups: dict[LoadGroup, int] = {}
        self.learnt: set[tuple[Configuration, int]] = set()
        self.resident: LoadGroup | None = None
        self.centres: set[Configuration] = set()
        self.worth: Any = np.zeros(0)  # per pair: the gain in the policy's ln(rate) that a look may bring
        self.standing: dict[int, float] = {}  # ln(rate) of the leading load group
        self.open: float | None = None
        self.relearnt = 0  # second looks
        self.doubtful: Any = np.zeros(0, bool)  # known, and worth a second look
        self.leader: LoadGroup | None = None  # the leading load group, once it is measured wherever it can serve
        self.room: Any = np.zeros(0)  # per pair: ln(budget / predicted)
        self.out: Any = np.zeros(0, bool)  # known, or ruled out by what is
        self.doubted: Any = np.zeros(0, bool)  # predicted, as far as is known, not to fit
        whole = list(islice(search.space.configurations(), _POOL + 1))
        self.whole = len(whole) <= _POOL
        self._extend(whole if self.whole else [*search.first, *self._drawn(_DRAWN)])
        if search.earlier:
            self._inform()

    def _inform(self) -> None:
        """Expect what earlier runs measured, each at the nearest of this run's contexts."""
        search = self.search
        self._extend(record.configuration for run in search.earlier for record in run.records)
        rates: list[list[tuple[int, float, float]]] = []
        peaks: list[tuple[int, float, float]] = []
        sound: list[tuple[int, float, float]] = []
        for run in search.earlier:
            rates.append([])
            for record in run.records:
                context = min(self.contexts, key=lambda c: abs(math.log2(c / record.context_tokens)))
                if abs(math.log2(context / record.context_tokens)) > _NEAR:
                    continue
                at = self.pool.index[record.configuration, context]
                if record.tokens_per_s and record.ttft_s and record.decode_tokens_per_s:
                    off = math.hypot(_EARLIER[run.same], record.spread or 0.0)
                    rates[-1].append((at, math.log(record.rate(search.workload.objective)), off))
                if run.same and record.peak_bytes and search.predicted is not None:
                    said = search.predicted(record.configuration, record.context_tokens)
                    peaks.append((at, math.log(record.peak_bytes / said), 0.01))
                if run.same and record.outcome in ("ok", "over_budget", "quality_loss", "unsupported"):
                    sound.append((at, float(record.outcome in ("ok", "over_budget")), 0.3))
        self.rate.inform(rates, _SHIFT)
        self.footprint.inform([peaks], 0.0)
        self.sound.inform([sound], 0.0)

    def _drawn(self, count: int) -> list[Configuration]:
        return [self.search.space.suggest(Drawn(self.random)) for _ in range(count)]

    def _extend(self, configurations: Iterable[Configuration]) -> None:
        """Take configurations into the pool, with a draft model also idle; all that was learnt is learnt again."""
        search, before = self.search, len(self.pool.pairs)
        self.pool.extend(with_idle(configurations))
        pairs = self.pool.pairs
        if len(pairs) == before:
            return
        grown = len(pairs) - before
        self.context = np.array([self.contexts.index(context) for _, context in pairs])
        self.group = np.array([self.groups.setdefault(c.load_group, len(self.groups)) for c, _ in pairs])
        room = [0.0] * grown
        if search.predicted is not None:
            room = [math.log(search.budget.bytes / search.predicted(*pair)) for pair in pairs[before:]]
        self.room = np.concatenate([self.room, room])
        self.out = np.concatenate([self.out, np.zeros(grown, bool)])
        self.doubted = np.concatenate([self.doubted, np.zeros(grown, bool)])
        self.doubtful = np.concatenate([self.doubtful, np.zeros(grown, bool)])
        mean = -_UNLIKE * self.pool.distance(search.first)
        if search.step_bytes is not None:
            order = {word: rank for rank, word in enumerate(search.space.choices["weights"])}
            mean -= _LATER * np.array([order.get(c.weights, len(order)) for c, _ in pairs])
            mean -= _BOUND * np.log([search.step_bytes(*pair) for pair in pairs])
        self.rate.reset(self.pool, mean)
        self.footprint.reset(self.pool, np.zeros(len(pairs)))
        self.sound.reset(self.pool, np.full(len(pairs), _SOUND))

    def _learn(self) -> None:
        """From every record that came since the last time."""
        search = self.search
        new = [pair for pair in search.known if pair not in self.learnt and pair[1] in self.contexts]
        self._extend(configuration for configuration, _ in new)
        for pair in new:
            self.learnt.add(pair)
            record, at = search.known[pair], self.pool.index[pair]
            self.out[at] = True
            if record.tokens_per_s is not None:
                rate = max(record.rate(search.workload.objective), 1e-9)
                self.rate.observe(at, math.log(rate), self._error(record))
                self.sound.observe(at, float(record.outcome in ("ok", "over_budget", "unstable")))
            elif record.outcome in ("unsupported", "crashed"):
                self.sound.observe(at, 0.0)
            if search.predicted is not None and record.peak_bytes:
                self.footprint.observe(at, math.log(record.peak_bytes / search.predicted(*pair)))
            elif search.predicted is not None and record.outcome == "out_of_memory":
                self.footprint.exceed(at, self.room[at])
            if did_not_load(record):
                self.out |= self.group == self.group[at]
            self.resident = None if record.reason.startswith(_LOADING) else record.configuration.load_group
        for record in search.again[self.relearnt :]:
            pair = record.configuration, record.context_tokens
            if pair in self.learnt:
                rate = math.log(record.rate(search.workload.objective))
                self.rate.observe(self.pool.index[pair], rate, self._error(record))
                self.resident = record.configuration.load_group
        self.relearnt = len(search.again)
        if new:
            self.doubted[:] = False

    def _error(self, record: Record) -> float:
        """The standard error of its ln(rate): that of a median over its rounds."""
        rates = record.round_rates(self.search.workload.objective)
        return median_error([math.log(rate) for rate in rates]) if len(rates) > 1 else _ONE_ROUND

    def chance(self, configuration: Configuration, context: int) -> float:
        """The probability that it fits."""
        self._learn()
        self._extend([configuration])
        return float(self._chances()[self.pool.index[configuration, context]])

    def _chances(self) -> Any:
        if self.search.predicted is None:
            return np.ones(len(self.pool.pairs))
        return below((self.room - self.footprint.mean) / self.footprint.deviation)

    def best(self) -> tuple[Configuration, int] | None:
        self._learn()
        if not self.whole:
            self._explore()
        while True:
            closed = self.out | self.doubted
            scores, least = self._scores(), self._least(closed)
            self.open = self._open(closed)
            scores[(closed | (self._chances() < least)) & ~self.doubtful] = -np.inf
            before = int(closed.sum())
            while scores[at := int(np.argmax(scores))] > -np.inf:
                scores[at] = -np.inf
                if self.doubtful[at]:
                    return self.pool.pairs[at]
                if self.search.ruled_out(*self.pool.pairs[at]):
                    self.out[at] = True
                elif self.search.fits(*self.pool.pairs[at]):
                    self.doubted[at] = True
                else:
                    return self.pool.pairs[at]
            ended = least == math.inf or self.whole
            if (self.out | self.doubted).sum() == before and (ended or not self._more()):
                return None

    def _open(self, closed: Any) -> float | None:
        """The share of the possible gain that is still open, 0 to 1; None before a load group is measured throughout.

        Open is what one more look at each context is expected to add to the policy's ln(rate); the possible gain is
        that and what the leading load group has gained over the baselines, or over what was measured first instead.
        """
        search = self.search
        if self.leader is None or not len(self.worth):
            return None
        worth = np.where(closed, 0.0, self.worth)
        more = sum(float(worth[self.context == c].max(initial=0.0)) for c in range(len(self.contexts)))
        began: dict[int, float] = {}
        rated = [(at, r) for (_, at), r in search.known.items() if at in self.contexts and r.tokens_per_s is not None]
        for context, record in sorted(rated, key=lambda item: item[1].stage != "baseline"):
            began.setdefault(context, math.log(max(record.rate(search.workload.objective), 1e-9)))
        gains = [top - began[context] for context, top in self.standing.items() if top > -np.inf]
        made = max(float(sum(gains)) / len(self.contexts), 0.0)
        return more / (more + made) if more > 0 else 0.0

    def _least(self, closed: Any) -> float:
        """The least probability of fitting that a look must have, so that about a tenth of all go over the budget.

        Each look allows for a tenth of one that does not fit, and begins with one whole. Where no pair is as sure as
        that, the surest are looked at, unless every context is served and even they are not likely to fit.
        """
        search, open_ = self.search, self._chances()[~closed]
        if search.predicted is None or not len(open_):
            return 0.0
        over = sum(record.outcome in TOO_LARGE for record in search.known.values())
        least = min(over + 1 - _RISK * (len(search.known) + 1) - _CREDIT, 1 - _RISK)
        surest = float(open_.max())
        return math.inf if self.leader is not None and surest < min(least, _LIKELY) else min(least, surest)

    def _explore(self) -> None:
        """Bring what differs in one knob from the best of each context into the pool."""
        search = self.search
        for context in self.contexts:
            sound = [r for (_, at), r in search.known.items() if at == context and r.outcome == "ok"]
            for record in sorted(sound, key=lambda r: -r.rate(search.workload.objective))[:_CENTRES]:
                if record.configuration not in self.centres:
                    self.centres.add(record.configuration)
                    self._extend(search.space.neighbours(record.configuration))

    def _more(self) -> bool:
        before = len(self.pool.pairs)
        self._extend(self._drawn(_DRAWN))
        return len(self.pool.pairs) > before

    def _scores(self) -> Any:
        """Per pair: the expected gain of the policy's ln(rate) over the seconds that it takes to look."""
        search, count = self.search, len(self.contexts)
        mean, deviation = self.rate.mean, self.rate.deviation
        chance = self._chances() * np.clip(self.sound.mean, 0.02, 1.0)
        standing = np.full((len(self.groups), count), -np.inf)
        for (configuration, context), record in search.known.items():
            if record.outcome == "ok" and context in self.contexts:
                cell = self.groups[configuration.load_group], self.contexts.index(context)
                standing[cell] = max(standing[cell], math.log(record.rate(search.workload.objective)))
        held = standing > -np.inf
        self.doubtful[:] = False
        look, load = self._times()
        seconds = look[self.context] + load[self.group] * _SHARED / count
        if not held.any():  # nothing to compare with: what experience has, where it fits for sure
            return mean + 0.5 * np.log(np.maximum(chance, 1e-9)) - 0.01 * seconds / seconds.min()
        open_ = ~(self.out | self.doubted)
        promise = np.where(open_, mean + 0.5 * deviation + np.log(np.maximum(chance, 1e-9)), -np.inf)
        top = np.full((len(self.groups), count), -1)
        order = np.argsort(promise, kind="stable")
        top[self.group[order], self.context[order]] = order
        usable = (top >= 0) & (promise[top] > -np.inf) & (chance[top] >= _POSSIBLE) & ~held
        sure = np.where(usable, chance[top], 0.0)
        floor = mean.min() - _UNCOVERED
        middle = np.where(held, standing, sure * mean[top] + (1 - sure) * floor)
        whole = held.any(axis=1) & ~usable.any(axis=1)  # measured wherever it can serve
        leader = int(np.where(whole if whole.any() else True, middle.sum(axis=1), -np.inf).argmax())
        missing = np.flatnonzero(usable[leader])
        self.leader = None if len(missing) else list(self.groups)[leader]
        self.worth = np.zeros(0)
        if len(missing):  # a policy needs all of its contexts: what may fail first, else what is looked at soonest
            at = top[leader, min(missing, key=lambda c: (round(sure[leader, c], 1), seconds[top[leader, c]]))]
            return np.where(np.arange(len(mean)) == at, 1.0, np.where(open_, 1e-3 * promise - seconds, -np.inf))
        # what it is worth if all of the group's contexts fit, times the probability that they do
        hope = np.where(held, standing, np.where(usable, mean[top], floor))
        after, weight = self._after(hope, np.where(usable, top, -1), open_ & (chance >= _LIKELY))
        leads = middle[leader].mean()
        gain = np.maximum(after - leads, 0.0) @ weight
        here, lacking = held[self.group, self.context], usable.any(axis=1)[self.group]
        # what is hoped for where the group was not measured is no merit of another look where it was
        gain -= np.where(here & lacking, np.maximum(hope.mean(axis=1) - leads, 0.0)[self.group], 0.0)
        needed = np.where(usable, chance[top], 1.0)
        others = np.stack([np.delete(needed, c, axis=1).min(axis=1, initial=1.0) for c in range(count)], axis=1)
        self.worth = np.minimum(chance, others[self.group, self.context]) * np.maximum(gain, 0.0)
        self.standing = dict(zip(self.contexts, standing[leader], strict=True))
        # where its group was not measured a look is a beginning: with what is likely to follow until it can be chosen
        missed = usable * look  # seconds, of what each group lacks
        follow = missed.sum(axis=1)[self.group] - missed[self.group, self.context]
        scores = self.worth / (seconds + np.where(here, 0.0, follow * ((after > leads) @ weight)))
        doubts = self._doubts(standing, middle.mean(axis=1), leader)
        # it takes all of a group to change the policy: what no time is left for comes last
        ahead = load[self.group] + missed.sum(axis=1)[self.group] + here * look[self.context]
        scores[lacking & (ahead > search.deadline - search.now())] *= 0.01
        scores[~here & (top[self.group, self.context] != np.arange(len(mean)))] = 0.0
        if scores[open_].max(initial=0.0) < 1e-12:
            scores = np.where(open_, 1e-3 * promise - seconds, -np.inf)  # what is cheapest to be sure of
        for at, worth in doubts.items():
            self.doubtful[at], scores[at] = True, worth / seconds[at]
        return scores

    def _after(self, hope: Any, top: Any, fits: Any) -> tuple[Any, Any]:
        """The ln(rate) of a policy with each pair's group once that is looked at (pairs x outcomes), and their weights.

        A look tells of the same configuration at other contexts as well, and of the pairs that would be measured where
        the group was not yet (`top`; -1 where it was), as far as they go together: the knowledge gradient for
        correlated beliefs (Frazier, Powell and Dayanik, 2009). `hope` is what the group has or is expected to have.
        """
        mean, pairs, count = self.rate.mean, np.arange(len(self.group)), len(self.contexts)
        told = np.hypot(self.rate.deviation, _ONE_ROUND / math.sqrt(2))  # by which two rounds may differ from the mean
        outcome, weight = np.polynomial.hermite_e.hermegauss(_OUTCOMES)
        after = np.zeros((len(pairs), _OUTCOMES))
        expected = hope.copy()  # of what is not known yet, too
        np.maximum.at(expected, (self.group[fits], self.context[fits]), mean[fits])
        for context in range(count):
            best, same = top[self.group, context], pairs // count * count + context  # as the pool has them
            slope = np.where(best >= 0, self.rate.between(np.maximum(best, 0), pairs), 0.0) / told
            reached = hope[self.group, context][:, None] + slope[:, None] * outcome
            also = mean[same][:, None] + (self.rate.between(same, pairs) / told)[:, None] * outcome
            # there it is measured; elsewhere it counts by how much more is expected than was
            least = np.where((best < 0) & (self.context != context), expected[self.group, context], reached.T).T
            after += (reached + np.where(fits[same][:, None], np.maximum(also - least, 0.0), 0.0)) / count
        return after, weight / weight.sum()

    def _doubts(self, standing: Any, means: Any, leader: int) -> dict[int, float]:
        """What a second look is worth, by pair: how likely it is to change the choice, and by how much.

        The choice is between load groups, and within the leading one at each context. A look at what leads can only
        lower it to what comes next; one at what does not can raise it over what leads.
        """
        search, count, found = self.search, len(self.contexts), {}
        whole = (standing > -np.inf).all(axis=1)
        others = np.where(whole & (np.arange(len(means)) != leader), means, -np.inf)
        looks = Counter((record.configuration, record.context_tokens) for record in search.again)
        cells: dict[tuple[int, int], list[tuple[float, int, Record]]] = {}
        for (configuration, context), record in search.known.items():
            if record.outcome == "ok" and record.samples and context in self.contexts:
                cell = self.groups[configuration.load_group], self.contexts.index(context)
                rate = math.log(record.rate(search.workload.objective))
                cells.setdefault(cell, []).append((rate, self.pool.index[configuration, context], record))
        for (group, context), here in cells.items():
            _, second = [*sorted((rate for rate, *_ in here), reverse=True), -np.inf][:2]
            for rate, at, record in here:
                behind = (rate - standing[group, context]) / count
                if group != leader:
                    gain = means[group] - means[leader] + behind if whole[group] else -np.inf
                elif behind < 0:
                    gain = behind
                else:
                    gain = max(float(others.max()) - means[leader], (second - rate) / count)
                looked = 1 + looks[self.pool.pairs[at]]
                if gain > -1 and looked < _LOOKS:
                    worth = float(improvement(gain, self._error(record) / math.sqrt(1 + looked) / count))
                    if worth >= _DOUBT:
                        found[at] = worth
        return found

    def _times(self) -> tuple[Any, Any]:
        """Seconds that a look takes at each context, and that loading each group takes: none where it is resident."""
        search, count = self.search, len(self.contexts)
        looks: list[list[float]] = [[] for _ in range(count)]
        loads: dict[tuple[str, bool], list[float]] = {}
        for (configuration, context), record in search.known.items():
            if record.tokens_per_s is not None and context in self.contexts:
                looks[self.contexts.index(context)].append(record.measure_s or 0.0)
            if record.load_s:
                loads.setdefault((configuration.weights, configuration.has_draft_model), []).append(record.load_s)
        means = [statistics.fmean(values) if values else None for values in looks]
        longest = max((value for value in means if value is not None), default=1.0)
        look = np.maximum([longest if value is None else value for value in means], 1e-3)
        usual = statistics.fmean([value for values in loads.values() for value in values] or [2 * longest])
        load = np.zeros(len(self.groups))
        for group, number in self.groups.items():
            if group != self.resident:
                load[number] = statistics.fmean(loads.get((group.weights, group.draft != "none"), [usual]))
        return look, load


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


def did_not_load(record: Record) -> bool:
    """Whether the load group itself failed; loading that took too long may have been the machine's doing."""
    return record.reason.startswith(_LOADING) and record.outcome != "timeout"
