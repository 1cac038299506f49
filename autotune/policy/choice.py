"""Which configuration is chosen at each context, by what was measured.

One load group serves all contexts, unless reloads are asked for; `best_group` says what it maximizes. A recommendation
is significant or it is the baseline: finalists are measured again, interleaved with the baseline, and compared by
Welch's t on the logarithms of their rounds' rates. So is a contender, another load group that the search found near the
best; which of them is loaded is decided by the finals of all contexts together. Of what is within error of the fastest
the simplest stands (`Configuration.simplicity`), among load groups and then among what one can do at each context. What
differs only in a chunk that the prompts of a context fit is the same thing there (`Configuration.at`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from ..config import Configuration, LoadGroup, Objective, Record, Workload
from .compare import (
    NEAR,
    as_done,
    broken,
    carried_out,
    compare,
    evidence_of,
    interval_of,
    log_rounds,
    may_match,
    near,
    sound,
    soundly_again,
    speedup,
    within,
)

# Share of the best rate that a simpler configuration must reach to be called a tie in the search; chosen, not measured.
TIE = 0.97


def best_group(records: Iterable[Record], workload: Workload) -> LoadGroup | None:
    """The load group that serves the workload fastest, of those that are ok at most of its contexts, and the longest.

    With a mix, which says how many of the requests have each length, that is the rate of all requests together: tokens
    over time, the harmonic mean of the contexts' rates weighted by the mix (the least mean seconds per request, as all
    generate equally many tokens). Without one nobody said how often each length comes. To suppose equally often would
    let the longest context decide alone, because its requests take most of the time; so there each context counts by
    how many times faster it gets, whatever its tokens/s: the geometric mean of the rates.
    """
    rates = _best_rates(records, workload)
    if not rates:
        return None
    return max(rates, key=lambda group: (len(rates[group]), max(rates[group]), _mean(rates[group], workload)))


def contender(
    records: Iterable[Record], workload: Workload, chosen: dict[int, Configuration]
) -> dict[int, Configuration]:
    """Another load group that the search found near the chosen one: its best configuration at each chosen context.

    One that is ok wherever the chosen load is, with a figure of at least `NEAR` of it (`best_group` says which). Of
    several the simplest if it is simpler than the chosen load, else the fastest. Empty where there is none, or where
    what is chosen has several loads.
    """
    records = list(records)
    ours = {configuration.load_group for configuration in chosen.values()}
    if len(ours) != 1:
        return {}
    (group,) = ours
    found: dict[LoadGroup, dict[int, Configuration]] = {}
    figures: dict[LoadGroup, float] = {}
    for other, rates in _best_rates(records, workload).items():
        if rates.keys() >= chosen.keys():
            figures[other] = _mean({context: rates[context] for context in chosen}, workload)
    for other in figures:
        if other != group and figures[other] >= NEAR * figures.get(group, math.inf):
            best = {context: best_in_group(records, other, context, workload.objective) for context in chosen}
            found[other] = {context: record.configuration for context, record in best.items() if record is not None}
    whole = [other for other in found if len(found[other]) == len(chosen)]
    if not whole:
        return {}
    simplest = min(whole, key=lambda other: other.simplicity)
    fastest = max(whole, key=lambda other: figures[other])
    return found[simplest if simplest.simplicity < group.simplicity else fastest]


def unfinished(records: Iterable[Record], workload: Workload, group: LoadGroup) -> LoadGroup | None:
    """The load group that would be the contender of this one if it were ok at every context, and lacks one of them."""
    rates = _best_rates(records, workload)
    figures = {}
    for other, theirs in rates.items():
        shared = [context for context in rates[group] if context in theirs]
        if other != group and 0 < len(shared) < len(rates[group]):
            sides = [_mean({context: side[context] for context in shared}, workload) for side in (theirs, rates[group])]
            figures[other] = sides[0] / sides[1]
    best = max(figures, key=lambda other: figures[other], default=None)
    return best if best is not None and figures[best] >= NEAR else None


def _best_rates(records: Iterable[Record], workload: Workload) -> dict[LoadGroup, dict[int, float]]:
    """The best rate of each load group at each context of the workload where it was ok."""
    rates: dict[LoadGroup, dict[int, float]] = {}
    for record in records:
        if record.outcome == "ok" and record.context_tokens in workload.contexts:
            at = rates.setdefault(record.configuration.load_group, {})
            rate = record.rate(workload.objective)
            at[record.context_tokens] = max(at.get(record.context_tokens, 0), rate)
    return rates


def _mean(rates: dict[int, float], workload: Workload) -> float:
    """What `best_group` maximizes, of a rate per context."""
    if not workload.mix:
        return statistics.geometric_mean(rates.values())
    share = dict(zip(workload.contexts, workload.mix, strict=True))
    return sum(share[c] for c in rates) / sum(share[c] / rate for c, rate in rates.items())


def maximized(workload: Workload) -> str:
    """`best_group`'s measure in words."""
    if workload.mix:
        return f"{workload.objective} rate of all requests together, mixed as given (weighted harmonic mean)"
    return f"geometric mean of the contexts' {workload.objective} rates"


def best_in_group(
    records: Iterable[Record], group: LoadGroup | None, context: int, objective: Objective
) -> Record | None:
    """The simplest of the records that are as fast as the group's fastest at this context, within error.

    Of all groups where `group` is None.
    """
    records = list(records)
    here = [r for r in sound(records, context) if group in (None, r.configuration.load_group)]
    if not here:
        return None
    best = max(here, key=lambda record: record.rate(objective))
    ties = [
        record
        for record in here
        if record.rate(objective) >= TIE * best.rate(objective) and speedup([best], [record], objective)[1] <= 1
    ]
    return min([best, *ties], key=lambda record: (record.configuration.complexity, -record.rate(objective)))


def choose(records: list[Record], workload: Workload, reloads: bool = False) -> dict[int, Configuration]:
    """The configuration of each context: all of one load group; with reloads of another one where it is faster."""
    group, objective = best_group(records, workload), workload.objective
    chosen = {}
    for context in workload.contexts:
        best = best_in_group(records, group, context, objective) if group is not None else None
        alone = best_in_group(records, None, context, objective) if reloads else None
        if alone is not None and (best is None or speedup([alone], [best], objective)[1] > 1):
            best = alone
        if best is not None:
            chosen[context] = best.configuration
    return chosen


def rivals(records: Iterable[Record], leader: Configuration, context: int, objective: Objective) -> list[Configuration]:
    """What else of its load group may be as fast as the leader at this context, the fastest first.

    The leader and what is returned are as `as_done` has them.
    """
    here = [r for r in sound(as_done(records), context) if r.configuration.load_group == leader.load_group]
    ours = [record for record in here if record.configuration == leader]
    fastest: dict[Configuration, Record] = {}
    for record in sorted(here, key=lambda r: (-r.rate(objective), r.configuration.simplicity)):
        if record.configuration != leader:
            fastest.setdefault(record.configuration, record)
    return [c for c, record in fastest.items() if ours and near([record], ours, objective)]


def keeps_up(
    records: Iterable[Record], ours: dict[int, Configuration], theirs: dict[int, Configuration], workload: Workload
) -> bool:
    """Whether our load may be as fast as theirs by the finals of all contexts together; yes where noise hides it."""
    done = as_done(records)
    mine, other = (
        _fastest(done, side[max(side)].load_group, list(theirs), workload.objective) for side in (ours, theirs)
    )
    if mine and other:
        return may_match(_overall(done, mine, other, workload))
    return not any(configuration in broken(done, context) for context, configuration in ours.items())


def _fastest(
    records: list[Record], group: LoadGroup, contexts: list[int], objective: Objective
) -> dict[int, Configuration]:
    """The fastest of a load group that was measured again at each context; empty where it has none at one of them."""
    ranked = {context: tied(records, group, context, objective) for context in contexts}
    return {context: found[0] for context, found in ranked.items()} if all(ranked.values()) else {}


def _overall(
    records: list[Record], ours: dict[int, Configuration], theirs: dict[int, Configuration], workload: Workload
) -> tuple[float, float, float]:
    """`speedup` of what `best_group` maximizes: of all contexts together, with their errors combined."""
    gain, terms = 0.0, []
    for side, sign in ((ours, 1), (theirs, -1)):
        found = {context: evidence_of(records, configuration, context) for context, configuration in side.items()}
        rounds = {context: log_rounds(evidence, workload.objective) for context, evidence in found.items()}
        rates = {context: math.exp(statistics.median(values)) for context, values in rounds.items()}
        gain += sign * math.log(_mean(rates, workload))
        terms += [(share, rounds[context]) for context, share in _shares(rates, workload).items()]
    return interval_of(gain, terms)


def _shares(rates: dict[int, float], workload: Workload) -> dict[int, float]:
    """How much of ln(`_mean`) each context's ln(rate) moves: all alike, or with a mix by the time that they take."""
    mix = dict(zip(workload.contexts, workload.mix, strict=True)) if workload.mix else rates
    time = {context: mix[context] / rate for context, rate in rates.items()}
    return {context: share / sum(time.values()) for context, share in time.items()}


def tied(
    records: Iterable[Record],
    group: LoadGroup,
    context: int,
    objective: Objective,
    beside: Configuration | None = None,
    any_load: bool = False,
) -> list[Configuration]:
    """Of what was measured again of a load group at this context the fastest, then what is within error of it.

    Each is compared with the fastest alone, since being within error does not carry over from one to the next. `beside`
    takes part whatever it loads. With `any_load` other load groups' are told too if they are within error of that
    fastest, and all are told by their rates.
    """
    done = as_done(records)
    finals = [r.configuration for r in sound(done, context) if r.stage == "final"]
    evidence = {c: evidence_of(done, c, context) for c in finals}
    rate = {c: statistics.median(log_rounds(found, objective)) for c, found in evidence.items()}
    ranked = sorted(evidence, key=lambda c: (-rate[c], c.simplicity))
    own = [c for c in ranked if c.load_group == group or c == beside]
    told = ranked if any_load else own
    return [c for c in told if own and (c == own[0] or within(speedup(evidence[c], evidence[own[0]], objective)))]


def _simplest(
    records: list[Record],
    chosen: Configuration,
    baseline: Configuration | None,
    context: int,
    objective: Objective,
) -> Configuration:
    """Of what tied when it was measured again, the simplest that is near the fastest; the chosen where nothing was.

    Where the fastest is significantly faster than the baseline, so is what is recommended. Noise that kept the chosen
    from being measured again does not make room for what is slower.
    """
    ties = tied(records, chosen.load_group, context, objective)
    if ties and _hidden(records, chosen, ties[0], context, objective):
        return chosen

    def gains(configuration: Configuration) -> bool:
        return compare(records, configuration, baseline, context, objective)[1] > 1

    good = [c for c in ties if compare(records, c, ties[0], context, objective)[0] >= NEAR]
    return min([c for c in good if gains(c) or not gains(ties[0])] or [chosen], key=lambda c: c.simplicity)


def _hidden(
    records: list[Record], configuration: Configuration, fastest: Configuration, context: int, objective: Objective
) -> bool:
    """Whether it was not soundly measured again, and is faster than the fastest that was by all that is known."""
    again = soundly_again(records, configuration, context)
    return not again and compare(records, configuration, fastest, context, objective)[1] > 1


def settle(
    records: list[Record],
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    workload: Workload,
    reloads: bool = False,
) -> dict[int, Configuration]:
    """The simplest of what was fastest when it was measured again, or stock where that is not significantly faster.

    First of the load groups, by all contexts together, unless there are reloads; then at each context.
    """
    records, baselines = as_done(records), carried_out(baselines)
    chosen = _standing(records, carried_out(chosen), workload.objective)
    contexts = [context for context in chosen if context in workload.contexts]
    stock = _stock(records, contexts, baselines, reloads)
    against = stock or baselines
    if contexts and not reloads:
        chosen = _of_the_best_load(records, chosen, contexts, against, workload)
    for context in contexts:
        chosen[context] = _simplest(records, chosen[context], against.get(context), context, workload.objective)
    faster = [c for c in stock if compare(records, chosen[c], stock[c], c, workload.objective)[1] > 1]
    return stock if stock and not faster else chosen


def _of_the_best_load(
    records: list[Record],
    chosen: dict[int, Configuration],
    contexts: list[int],
    baselines: dict[int, Configuration],
    workload: Workload,
) -> dict[int, Configuration]:
    """The chosen, or the fastest of another load group that the finals of all contexts together prefer.

    That is the simplest of the load groups that tie with the fastest and are near it. Where the fastest is somewhere
    significantly faster than the baseline, so is it. What was not measured again at every context takes no part; where
    the chosen failed, only what is faster than the baseline takes its place, and where noise hides it nothing does.
    """
    objective, ours = workload.objective, chosen[max(contexts)].load_group
    sides = {group: _fastest(records, group, contexts, objective) for group in _measured_again(records)}
    sides = {group: side for group, side in sides.items() if side}
    outcomes = [
        {r.outcome for r in records if (r.configuration, r.context_tokens, r.stage) == (chosen[c], c, "final")}
        for c in contexts
    ]
    if any(found and "ok" not in found for found in outcomes):
        return chosen

    def gains(side: dict[int, Configuration]) -> bool:
        return any(compare(records, side[c], baselines.get(c), c, objective)[1] > 1 for c in contexts)

    if ours not in sides:
        sides = {group: side for group, side in sides.items() if gains(side)}
        if not sides:
            return chosen
    simplest_first = sorted(sides, key=lambda group: group.simplicity)
    leader = sides[simplest_first[0]]
    for group in simplest_first:
        if _overall(records, sides[group], leader, workload)[0] > 1:
            leader = sides[group]
    for group in simplest_first:
        compared = _overall(records, sides[group], leader, workload)
        alike = compared[0] >= NEAR and within(compared) and (gains(sides[group]) or not gains(leader))
        if sides[group] is leader or alike:
            break
    if group == ours:
        return chosen
    elsewhere = {c: between for c, between in chosen.items() if c not in contexts and between.load_group == group}
    return {**elsewhere, **sides[group]}


def tied_loads(
    records: list[Record], chosen: dict[int, Configuration], baselines: dict[int, Configuration], workload: Workload
) -> list[tuple[LoadGroup, float]]:
    """Other load groups within error of the chosen one over all contexts, and not as simple, with their gains."""
    contexts = [context for context in chosen if context in workload.contexts]
    if all(chosen[context] == baselines.get(context) for context in contexts):
        return []
    ours, found = chosen[max(contexts)].load_group, []
    mine = _fastest(records, ours, contexts, workload.objective)
    for group in sorted(_measured_again(records) - {ours}, key=lambda group: group.simplicity):
        theirs = _fastest(records, group, contexts, workload.objective)
        if mine and theirs and ours.simplicity < group.simplicity:
            compared = _overall(records, theirs, mine, workload)
            if within(compared):
                found.append((group, compared[0]))
    return found


def _measured_again(records: list[Record]) -> set[LoadGroup]:
    return {record.configuration.load_group for record in records if record.stage == "final"}


def _stock(
    records: list[Record], contexts: list[int], baselines: dict[int, Configuration], reloads: bool
) -> dict[int, Configuration]:
    """The baseline per context, of one load group unless reloads are asked for; nothing where one is missing.

    Baselines of two groups are those of a budget that binds at long contexts: what runs there is taken for the short
    ones as well, where it was measured.
    """
    for longest in sorted(baselines, reverse=True):
        kept = {}
        for context in contexts:
            same = [baselines[c] for c in (context, longest) if c in baselines]
            same = [b for b in same if reloads or b.load_group == baselines[longest].load_group]
            stood = [b for b in same if evidence_of(records, b, context) and b not in broken(records, context)]
            if stood and context in baselines:
                kept[context] = stood[0]
        if len(kept) == len(contexts):
            return kept
    return {}


def _standing(
    records: list[Record], chosen: dict[int, Configuration], objective: Objective
) -> dict[int, Configuration]:
    """The chosen, or the next best of the load group where the chosen failed when it was measured again."""
    standing = {}
    for context, configuration in chosen.items():
        if configuration not in broken(records, context):
            standing[context] = configuration
        elif (best := best_in_group(records, configuration.load_group, context, objective)) is not None:
            standing[context] = best.configuration
    return standing
