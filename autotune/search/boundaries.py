"""Lengths between contexts up to which the lower context's choice is the better one, found by halving."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import Configuration, Workload
from ..policy.compare import speedup
from ..trial.inputs import (
    lengths_between,
)
from ..trial.process import WorkerFailed
from ..trial.trials import Trials
from .schedule import seconds_for
from .search import Search
from .watch import Watch


def changes(chosen: dict[int, Configuration], workload: Workload) -> list[tuple[int, int]]:
    """Neighbouring contexts whose choices differ, but not in what they load: both can be measured side by side.

    Where the longer one's does the same at the shorter one, nothing changes between them.
    """
    pairs = [pair for pair in pairwise(sorted(workload.contexts)) if all(context in chosen for context in pair)]
    return [
        (low, high)
        for low, high in pairs
        if chosen[low].at(low) != chosen[high].at(low) and chosen[low].load_group == chosen[high].load_group
    ]


def bisect(search: Search, lower: tuple[int, Configuration], upper: tuple[int, Configuration], until: float) -> int:
    """The longest length at which the lower context's choice was at least as fast as the upper's, within error."""
    (low, ours), (high, theirs) = lower, upper
    lengths = [low, *lengths_between(low, high)]
    left, right = 0, len(lengths)
    while right - left > 1:
        middle = (left + right) // 2
        length = lengths[middle]
        if search.now() + seconds_for(search, [(ours, high), (theirs, high)]) > until:
            break
        if search.fits(ours, length):
            right = middle
            continue
        first, second = (search.measured(configuration, length, "boundary") for configuration in (ours, theirs))
        sound = [record.outcome == "ok" for record in (first, second)]
        one_sided = (math.inf,) * 3 if sound[0] else (0.0,) * 3
        _, least, most = speedup([first], [second], search.workload.objective) if all(sound) else one_sided
        left, right = (left, middle) if most < 1 else (middle, right)
        if least <= 1 <= most:
            break
    return lengths[left]


def boundaries(
    search: Search,
    trials: Trials,
    chosen: dict[int, Configuration],
    until: float,
    reference: tuple[str, dict[str, Any]],
    watch: Watch,
) -> dict[int, Configuration]:
    """Lengths between contexts up to which the lower context's choice is better, as far as there is time to look.

    Speed, footprint and text are compared while halving; where a boundary is found, the reference (its weights, and the
    facts that decide its logits) is scored at that length and the choice is measured there again, quality included: a
    rule ends only where all of it was measured.
    """
    found: dict[int, Configuration] = {}
    for low, high in changes(chosen, search.workload):
        ours, theirs = chosen[low], chosen[high]
        until -= seconds_for(search, [(ours, high)], load=True)  # to measure it again at its end
        watch.phase(f"looking between {low} and {high} for where the choice changes")
        length = bisect(search, (low, ours), (high, theirs), until)
        if length > low:
            found[length] = ours
    unscored = [length for length in found if search.known[found[length], length].perplexity_ratio is None]
    try:
        scored = trials.score(unscored, *reference) if unscored else {}
    except WorkerFailed as failure:
        watch.note(f"no boundary between contexts: the reference could not be scored there ({failure.reason})")
        return {}
    for length, path in scored.items():
        search.measured(found[length], length, "boundary", again=True)
        Path(path).unlink()
    return {length: ours for length, ours in found.items() if search.known[ours, length].outcome == "ok"}
