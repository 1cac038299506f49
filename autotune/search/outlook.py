"""What a look at a pair is worth, and which comes next.

A pair is worth the gain that it can be expected to bring to the policy, a load group at every context, times the
probability that it is feasible, over the seconds that a look takes, its part of the load included. The load group that
promises most is first measured at every context that it can serve. What was measured is measured again only where its
error leaves the choice open: then a second look is weighed like a first one, by what it may change.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

import numpy as np

from ..config import Configuration, LoadGroup, Record
from .knowledge import TOO_LARGE
from .pairs import ONE_ROUND, Pairs
from .surrogate import improvement

# Sections are of benchmarks/LOG.md, whose figures are replays of recorded sweeps (benchmarks/search_regret.py).
_UNCOVERED = 2.0  # ln(rate) below the worst, which a context that is not served counts as; chosen, not measured
_POSSIBLE = 0.1  # probability of being feasible below which a group does not hope to serve a context; chosen as well
# Share of the looks that may go over the budget, and looks that may do so to begin with: 10.3 % went over, 10.5 with
# one to begin with, 19 without a bound ("The search on a recorded sweep of the bundled pair").
_RISK, _CREDIT = 0.1, 0.5
# Probability of fitting that the surest look must have once a group leads, else the search ends: 0.75 lost (as above).
# Below the same of being feasible nothing is hoped for from what else a look tells; chosen.
_LIKELY = 0.5
_LOOKS = 3  # at the same pair, the most: argued ("Second looks"), not measured; finals look at what is chosen again
_DOUBT = 0.0003  # of the policy's ln(rate), the least for which a pair is looked at again: 0.001 did as well (there)
_OUTCOMES = 15  # of a look, which stand for what it may say: nodes of a Gauss-Hermite rule; chosen, not measured
_SHARED = 2.0  # of a load, over the number of contexts, is laid on the look that begins it; chosen, not measured


class Outlook:
    """What each pair is worth to the policy, from what is believed of all of them."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.known = pairs, pairs.known
        self.worth: Any = np.zeros(0)  # per pair: the gain in the policy's ln(rate) that a look may bring
        self.standing: dict[int, float] = {}  # ln(rate) of the leading load group
        self.open: float | None = None
        self.doubtful: Any = np.zeros(0, bool)  # known, and worth a second look
        self.leader: LoadGroup | None = None  # the leading load group, once it is measured wherever it can serve

    def best(self, left_s: float) -> tuple[Configuration, int] | None:
        """The pair with the most to expect of the time that it takes, of which `left_s` is left; None if none is."""
        self.pairs.learn()
        if not self.pairs.whole:
            self.pairs.explore()
        while True:
            closed = self.pairs.out | self.pairs.doubted
            scores, least = self._scores(left_s), self._least(closed)
            self.open = self._open(closed)
            scores[(closed | (self.pairs.chances() < least)) & ~self.doubtful] = -np.inf
            before = int(closed.sum())
            while scores[at := int(np.argmax(scores))] > -np.inf:
                scores[at] = -np.inf
                if self.doubtful[at]:
                    return self.pairs.pool.pairs[at]
                if self.known.ruled_out(*self.pairs.pool.pairs[at]):
                    self.pairs.out[at] = True
                elif self.known.fits(*self.pairs.pool.pairs[at]):
                    self.pairs.doubted[at] = True
                else:
                    return self.pairs.pool.pairs[at]
            ended = least == math.inf or self.pairs.whole
            if (self.pairs.out | self.pairs.doubted).sum() == before and (ended or not self.pairs.more()):
                return None

    def _open(self, closed: Any) -> float | None:
        """The share of the possible gain that is still open, 0 to 1; None before a load group is measured throughout.

        Open is what one more look at each context is expected to add to the policy's ln(rate); the possible gain is
        that and what the leading load group has gained over the baselines, or over what was measured first instead.
        """
        known = self.known
        if self.leader is None or not len(self.worth):
            return None
        worth = np.where(closed, 0.0, self.worth)
        more = sum(float(worth[self.pairs.context == c].max(initial=0.0)) for c in range(len(self.pairs.contexts)))
        began: dict[int, float] = {}
        rated = [
            (at, r) for (_, at), r in known.known.items() if at in self.pairs.contexts and r.tokens_per_s is not None
        ]
        for context, record in sorted(rated, key=lambda item: item[1].stage != "baseline"):
            began.setdefault(context, math.log(max(record.rate(known.workload.objective), 1e-9)))
        gains = [top - began[context] for context, top in self.standing.items() if top > -np.inf]
        made = max(float(sum(gains)) / len(self.pairs.contexts), 0.0)
        return more / (more + made) if more > 0 else 0.0

    def _least(self, closed: Any) -> float:
        """The least probability of fitting that a look must have, so that about a tenth of all go over the budget.

        Each look allows for a tenth of one that does not fit, and the search begins with half of one. Where no pair
        is as sure as that, the surest are looked at, unless every context is served and even they are not likely to
        fit.
        """
        known, open_ = self.known, self.pairs.chances()[~closed]
        if known.predicted is None or not len(open_):
            return 0.0
        over = sum(record.outcome in TOO_LARGE for record in known.known.values())
        least = min(over + 1 - _RISK * (len(known.known) + 1) - _CREDIT, 1 - _RISK)
        surest = float(open_.max())
        return math.inf if self.leader is not None and surest < min(least, _LIKELY) else min(least, surest)

    def _scores(self, left_s: float) -> Any:
        """Per pair: the expected gain of the policy's ln(rate) over the seconds that it takes to look."""
        known, count = self.known, len(self.pairs.contexts)
        mean, deviation = self.pairs.rate.mean, self.pairs.rate.deviation
        chance = self.pairs.chances() * np.clip(self.pairs.sound.mean, 0.02, 1.0)
        standing = np.full((len(self.pairs.groups), count), -np.inf)
        for (configuration, context), record in known.known.items():
            if record.outcome == "ok" and context in self.pairs.contexts:
                cell = self.pairs.groups[configuration.load_group], self.pairs.contexts.index(context)
                standing[cell] = max(standing[cell], math.log(record.rate(known.workload.objective)))
        held = standing > -np.inf
        self.doubtful = np.zeros(len(mean), bool)
        look, load = self._times()
        seconds = look[self.pairs.context] + load[self.pairs.group] * _SHARED / count
        if not held.any():  # nothing to compare with: what experience has, where it fits for sure
            return mean + 0.5 * np.log(np.maximum(chance, 1e-9)) - 0.01 * seconds / seconds.min()
        open_ = ~(self.pairs.out | self.pairs.doubted)
        promise = np.where(open_, mean + 0.5 * deviation + np.log(np.maximum(chance, 1e-9)), -np.inf)
        top = np.full((len(self.pairs.groups), count), -1)
        order = np.argsort(promise, kind="stable")
        top[self.pairs.group[order], self.pairs.context[order]] = order
        usable = (top >= 0) & (promise[top] > -np.inf) & (chance[top] >= _POSSIBLE) & ~held
        sure = np.where(usable, chance[top], 0.0)
        floor = mean.min() - _UNCOVERED
        middle = np.where(held, standing, sure * mean[top] + (1 - sure) * floor)
        whole = held.any(axis=1) & ~usable.any(axis=1)  # measured wherever it can serve
        leader = int(np.where(whole if whole.any() else True, middle.sum(axis=1), -np.inf).argmax())
        missing = np.flatnonzero(usable[leader])
        self.leader = None if len(missing) else list(self.pairs.groups)[leader]
        self.worth = np.zeros(0)
        if len(missing):  # a policy needs all of its contexts: what may fail first, else what is looked at soonest
            at = top[leader, min(missing, key=lambda c: (round(sure[leader, c], 1), seconds[top[leader, c]]))]
            return np.where(np.arange(len(mean)) == at, 1.0, np.where(open_, 1e-3 * promise - seconds, -np.inf))
        # what it is worth if all of the group's contexts fit, times the probability that they do
        hope = np.where(held, standing, np.where(usable, mean[top], floor))
        after, weight = self._after(hope, np.where(usable, top, -1), open_ & (chance >= _LIKELY))
        leads = middle[leader].mean()
        gain = np.maximum(after - leads, 0.0) @ weight
        here, lacking = held[self.pairs.group, self.pairs.context], usable.any(axis=1)[self.pairs.group]
        # what is hoped for where the group was not measured is no merit of another look where it was
        gain -= np.where(here & lacking, np.maximum(hope.mean(axis=1) - leads, 0.0)[self.pairs.group], 0.0)
        needed = np.where(usable, chance[top], 1.0)
        others = np.stack([np.delete(needed, c, axis=1).min(axis=1, initial=1.0) for c in range(count)], axis=1)
        self.worth = np.minimum(chance, others[self.pairs.group, self.pairs.context]) * np.maximum(gain, 0.0)
        self.standing = dict(zip(self.pairs.contexts, standing[leader], strict=True))
        # where its group was not measured a look is a beginning: with what is likely to follow until it can be chosen
        missed = usable * look  # seconds, of what each group lacks
        follow = missed.sum(axis=1)[self.pairs.group] - missed[self.pairs.group, self.pairs.context]
        scores = self.worth / (seconds + np.where(here, 0.0, follow * ((after > leads) @ weight)))
        doubts = self._doubts(standing, middle.mean(axis=1), leader)
        # it takes all of a group to change the policy: what no time is left for comes last
        ahead = load[self.pairs.group] + missed.sum(axis=1)[self.pairs.group] + here * look[self.pairs.context]
        scores[lacking & (ahead > left_s)] *= 0.01
        scores[~here & (top[self.pairs.group, self.pairs.context] != np.arange(len(mean)))] = 0.0
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
        mean, pairs, count = self.pairs.rate.mean, np.arange(len(self.pairs.group)), len(self.pairs.contexts)
        told = np.hypot(
            self.pairs.rate.deviation, ONE_ROUND / math.sqrt(2)
        )  # by which two rounds may differ from the mean
        outcome, weight = np.polynomial.hermite_e.hermegauss(_OUTCOMES)
        after = np.zeros((len(pairs), _OUTCOMES))
        expected = hope.copy()  # of what is not known yet, too
        np.maximum.at(expected, (self.pairs.group[fits], self.pairs.context[fits]), mean[fits])
        for context in range(count):
            best, same = top[self.pairs.group, context], pairs // count * count + context  # as the pool has them
            slope = np.where(best >= 0, self.pairs.rate.between(np.maximum(best, 0), pairs), 0.0) / told
            reached = hope[self.pairs.group, context][:, None] + slope[:, None] * outcome
            also = mean[same][:, None] + (self.pairs.rate.between(same, pairs) / told)[:, None] * outcome
            # there it is measured; elsewhere it counts by how much more is expected than was
            least = np.where(
                (best < 0) & (self.pairs.context != context), expected[self.pairs.group, context], reached.T
            ).T
            after += (reached + np.where(fits[same][:, None], np.maximum(also - least, 0.0), 0.0)) / count
        return after, weight / weight.sum()

    def _doubts(self, standing: Any, means: Any, leader: int) -> dict[int, float]:
        """What a second look is worth, by pair: how likely it is to change the choice, and by how much.

        The choice is between load groups, and within the leading one at each context. A look at what leads can only
        lower it to what comes next; one at what does not can raise it over what leads.
        """
        known, count, found = self.known, len(self.pairs.contexts), {}
        whole = (standing > -np.inf).all(axis=1)
        others = np.where(whole & (np.arange(len(means)) != leader), means, -np.inf)
        looks = Counter((record.configuration, record.context_tokens) for record in known.again)
        cells: dict[tuple[int, int], list[tuple[float, int, Record]]] = {}
        for (configuration, context), record in known.known.items():
            if record.outcome == "ok" and record.samples and context in self.pairs.contexts:
                cell = self.pairs.groups[configuration.load_group], self.pairs.contexts.index(context)
                rate = math.log(record.rate(known.workload.objective))
                cells.setdefault(cell, []).append((rate, self.pairs.pool.index[configuration, context], record))
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
                looked = 1 + looks[self.pairs.pool.pairs[at]]
                if gain > -1 and looked < _LOOKS:
                    worth = float(improvement(gain, self.pairs.error(record) / math.sqrt(1 + looked) / count))
                    if worth >= _DOUBT:
                        found[at] = worth
        return found

    def _times(self) -> tuple[Any, Any]:
        """Seconds that a look takes at each context, and that loading each group takes: none where it is resident."""
        known, count = self.known, len(self.pairs.contexts)
        looks: list[list[float]] = [[] for _ in range(count)]
        loads: dict[tuple[str, bool], list[float]] = {}
        for (configuration, context), record in known.known.items():
            if record.tokens_per_s is not None and context in self.pairs.contexts:
                looks[self.pairs.contexts.index(context)].append(record.measure_s or 0.0)
            if record.load_s:
                loads.setdefault((configuration.weights, configuration.has_draft_model), []).append(record.load_s)
        means = [statistics.fmean(values) if values else None for values in looks]
        longest = max((value for value in means if value is not None), default=1.0)
        look = np.maximum([longest if value is None else value for value in means], 1e-3)
        usual = statistics.fmean([value for values in loads.values() for value in values] or [2 * longest])
        load = np.zeros(len(self.pairs.groups))
        for group, number in self.pairs.groups.items():
            if group != self.pairs.resident:
                load[number] = statistics.fmean(loads.get((group.weights, group.draft != "none"), [usual]))
        return look, load
