"""How long measuring takes, by what measuring took."""

from __future__ import annotations

from ..config import Configuration, Record
from .search import Search

# Time that a finalist's measurement takes, over that of a look which also measured quality; chosen, not measured.
CARE_OVER_LOOK = 1.1


def measured_alike(search: Search, configuration: Configuration, context: int) -> Record | None:
    """What the search measured of the same thing."""
    same = (r for (c, at), r in search.known.items() if at == context and c.at(at) == configuration.at(at))
    return next(same, None)


def seconds_for(search: Search, pairs: list[tuple[Configuration, int]], load: bool = False) -> float:
    """What measuring these took, or what measuring anything took at most; with the load."""
    known = [measured_alike(search, *pair) for pair in pairs]
    longest = max((r.measure_s or 0 for r in search.known.values()), default=0.0)
    seconds = sum((r.measure_s or 0) if r is not None else longest for r in known)
    return CARE_OVER_LOOK * seconds + (max((r.load_s or 0 for r in known if r is not None), default=0.0) + 6) * load
