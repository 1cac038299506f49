"""The search: which pair is measured next, until time, trials or the space run out.

How to measure is handed in: `measure(configuration, context, stage)`. What to measure next, at which context, `outlook`
says; `study` stores what came of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..config import Configuration, LoadGroup, Record
from ..results import RECORD
from .knowledge import Knowledge
from .outlook import Outlook
from .pairs import Pairs
from .study import Studies

Measure = Callable[[Configuration, int, str], Record]

# All chosen, not measured.
_TRIES = 3  # winners elsewhere that are tried at a context before the load group is left without a record there
COMPARABLE = ("ok", "quality_loss", "unstable")  # of a baseline, which need not be recommendable to be compared with
_SURE = 0.9  # probability of fitting from which on a search begins with what experience favours
_FEW = 2000  # pairs of a space up to which what was not measured is looked through, one by one, for what cannot fit


@dataclass(kw_only=True)
class Search(Knowledge):
    """One run's search, over all its contexts."""

    studies: Studies
    measure: Measure
    deadline: float  # as `now` has it
    max_trials: int | None = None
    on_record: Callable[[Record], None] = lambda record: None
    now: Callable[[], float] = lambda: time.monotonic()

    def run(self) -> None:
        """Measure until time, trials or the space run out.

        A load group that comes to lead is looked at with its draft model idle as well, at every context: that takes no
        load, and what a draft is worth there is seldom known from elsewhere.
        """
        for opening in self._opening():
            if not self._over() and self._pairs.chance(*opening) >= _SURE and opening not in self.known:
                self._measured(*opening, "search")
        weighed: set[LoadGroup] = set()
        while not self._over():
            pair, leader = self._next(), self._outlook.leader
            if leader is not None and leader not in weighed:
                weighed.add(leader)
                for configuration, context in idle(self, leader):
                    if not self._over():
                        also(self, configuration, context)
            elif pair is None:
                return
            else:
                self._measured(*pair, "search")

    def _opening(self) -> list[tuple[Configuration, int]]:
        """What experience favours of what the baseline has loaded, at every context.

        It takes no load, every run begins with it, and it tells what the knobs beside the load are worth here.
        """
        groups = [c.load_group for (c, _), record in self.known.items() if record.stage == "baseline"]
        favoured = [c for c in self.first if groups and c.load_group == groups[-1]]
        return [(c, context) for c in favoured[:1] for context in self.workload.contexts]

    def baseline(self, candidates: list[Configuration], sure: float = 0.0) -> None:
        """Measure, per context, the first candidate that fits: what a user would run without tuning.

        What fits with a lesser probability than `sure` is left for when more is known.
        """
        for candidate in candidates:
            for context in self.workload.contexts:
                if (candidate, context) in self.known or self.baseline_of(context, candidates) is not None:
                    continue
                if not self.too_large(candidate, context) and self._pairs.chance(candidate, context) >= sure:
                    self._measured(candidate, context, "baseline")

    def baseline_of(self, context: int, candidates: list[Configuration]) -> Record | None:
        for candidate in candidates:
            record = self.known.get((candidate, context))
            if record is not None and record.outcome in COMPARABLE:
                return record
        return None

    def _over(self) -> bool:
        measured = sum(record.stage == "search" for record in [*self.known.values(), *self.again])
        return self.now() >= self.deadline or (self.max_trials is not None and measured >= self.max_trials)

    @cached_property
    def _pairs(self) -> Pairs:
        return Pairs(self)

    @cached_property
    def _outlook(self) -> Outlook:
        return Outlook(self._pairs)

    @property
    def open(self) -> float | None:
        """The share of the possible gain that was open when the last pair was chosen; None while nobody knows."""
        return self._outlook.open

    def _next(self) -> tuple[Configuration, int] | None:
        """The pair with the most to expect of the time that it takes, or None if none is left."""
        return self._outlook.best(self.deadline - self.now())

    def _measured(self, configuration: Configuration, context: int, stage: str) -> Record:
        trial = None
        if stage != "boundary":
            parameters = self.space.parameters(configuration)
            if parameters is not None:
                trial = self.studies.ask(context, parameters)
                self.space.suggest(trial)
        record = self.measure(configuration, context, stage)
        self.learn(record)
        if trial is None:
            self.studies.keep(record)
        else:
            trial.set_user_attr(RECORD, json.dumps(record.to_json()))
            self.studies.tell(context, trial, record, self.workload, self.budget)
        self.on_record(record)
        return record

    def measured(
        self, configuration: Configuration, context: int, stage: str = "search", again: bool = False
    ) -> Record:
        """The record of a configuration at a context, measured now if it is not known or is asked for again."""
        known = self.known.get((configuration, context))
        return known if known is not None and not again else self._measured(configuration, context, stage)


def complete(search: Search, group: LoadGroup) -> None:
    """Give a load group a record at every context, from the knobs that won elsewhere, its draft used and idle."""
    for context in search.workload.contexts:
        best = [record.configuration for record in _fastest(search, group)]
        for candidate in list(dict.fromkeys(best))[:_TRIES]:
            if also(search, candidate, context) == "ok":
                break
    for configuration, context in idle(search, group):
        also(search, configuration, context)


def idle(search: Search, group: LoadGroup) -> Iterator[tuple[Configuration, int]]:
    """What is fastest of a load group at each context, with its draft model idle."""
    for context in search.workload.contexts if group.draft != "none" else ():
        here = [record for record in _fastest(search, group) if record.context_tokens == context]
        if here:
            yield here[0].configuration.replace(depth=0), context


def _fastest(search: Search, group: LoadGroup) -> list[Record]:
    """The sound records of a load group, the fastest first."""
    sound = (r for r in search.known.values() if r.outcome == "ok" and r.configuration.load_group == group)
    return sorted(sound, key=lambda record: -record.rate(search.workload.objective))


def also(search: Search, configuration: Configuration, context: int) -> str:
    """The outcome of a configuration at a context, measured if there is time and it may fit; nothing if not."""
    known = (configuration, context) in search.known
    if not known and (search.now() >= search.deadline or search.too_large(configuration, context)):
        return ""
    return search.measured(configuration, context).outcome


def coverage(search: Search) -> str:
    """How much of the space was measured; of a small one also what the plan or an earlier record ruled out."""
    pairs = [(c, context) for c in search.space.configurations() for context in search.workload.contexts]
    left = [pair for pair in pairs if pair not in search.known]
    text = f"measured {len(pairs) - len(left)} of {len(pairs)} (configuration, context) pairs of the space"
    if left and len(pairs) <= _FEW:
        hopeless = sum(bool(search.hopeless(*pair)) for pair in left)
        text += f"; {hopeless} more cannot fit or cannot differ"
    return text
