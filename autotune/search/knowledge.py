"""What a search knows: its task, what was measured, and what that rules out. Plain data, which the outlook reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import Budget, Configuration, Record, Workload
from ..samples import joined
from .earlier import Earlier
from .space import Space

Fits = Callable[[Configuration, int], str]  # why the plan says that it cannot fit, or nothing

TOO_LARGE = ("over_budget", "out_of_memory")
LOADING = "while loading"  # how the reason of a record starts whose load group could not be loaded


@dataclass(kw_only=True)
class Knowledge:
    """One run's task and what is known of it, over all its contexts."""

    space: Space
    workload: Workload
    budget: Budget
    fits: Fits
    seed: int = 0
    first: tuple[Configuration, ...] = ()  # what experience says may win
    known: dict[tuple[Configuration, int], Record] = field(default_factory=dict)
    again: list[Record] = field(default_factory=list)  # second looks, which `known` has with the first ones
    earlier: tuple[Earlier, ...] = ()  # runs to learn from
    predicted: Callable[[Configuration, int], int] | None = None  # the footprint, uncalibrated, in bytes
    step_bytes: Callable[[Configuration, int], float] | None = None  # read by a decode step, where that sets its pace

    def learn(self, record: Record) -> None:
        """Know a record; with what was known of the same pair, where that was looked at before."""
        pair = record.configuration, record.context_tokens
        self.known[pair] = joined(self.known.get(pair), record)
        if self.known[pair] is not record:
            self.again.append(record)

    def hopeless(self, configuration: Configuration, context: int) -> str:
        """Why measuring it cannot change the answer: what is known of the same load or the same text, or the plan."""
        return self.ruled_out(configuration, context) or self.fits(configuration, context)

    def ruled_out(self, configuration: Configuration, context: int) -> str:
        """The same by what was measured alone, which stays."""
        same = configuration.at(context)
        for (other, at), record in self.known.items():
            if did_not_load(record) and other.load_group == configuration.load_group:
                return record.reason
            if at == context and other != configuration and other.at(at) == same:
                return f"at {at} tokens the same as {other.differs_from(configuration)}"
            if at != context or record.outcome != "quality_loss" or other.quality_key != configuration.quality_key:
                continue
            if other != configuration:
                return record.reason
        return self._outgrown(configuration, context)

    def too_large(self, configuration: Configuration, context: int) -> str:
        """Why it cannot fit: what needs no more did not, or the plan says so."""
        return self._outgrown(configuration, context) or self.fits(configuration, context)

    def _outgrown(self, configuration: Configuration, context: int) -> str:
        """Which record of what needs no more did not fit.

        What did not fit is a lower bound. It needs no more than the same configuration at a longer context, which holds
        all that a shorter one does, and no more than one with the same words that the plan puts at as much or more.
        """
        for (other, at), record in self.known.items():
            if at > context or record.outcome not in TOO_LARGE or _held(other) != _held(configuration):
                continue
            if other == configuration and at < context:
                return f"at {at} tokens: {record.reason}"
            if other == configuration or self.predicted is None:
                continue
            if self.predicted(configuration, context) >= self.predicted(other, at):
                return f"at {at} tokens, with what needs no more: {record.reason}"
        return ""


def did_not_load(record: Record) -> bool:
    """Whether the load group itself failed; loading that took too long may have been the machine's doing."""
    return record.reason.startswith(LOADING) and record.outcome != "timeout"


def _held(configuration: Configuration) -> tuple[str, ...]:
    """The words of what is held: only of configurations that share them can the plan say which needs more."""
    c = configuration
    return c.weights, c.lm_head, c.embeddings, c.cache, c.draft, c.draft_weights, c.launch
