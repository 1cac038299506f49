"""Finals: what was chosen is measured again beside what may be as fast, and between contexts where the choice changes.

The chosen is measured in turn with a contender, another load group that may be as fast, and the baseline, each in a
fresh worker; each of the two loads also tries what led with the other. What comes of it is decided by `choice.settle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from ..config import Configuration, Record
from ..policy.choice import best_group, choose, contender, keeps_up, rivals, tied, unfinished
from ..policy.compare import near
from ..trial.trials import Trials
from .boundaries import changes
from .schedule import CARE_OVER_LOOK, measured_alike, seconds_for
from .search import Search, also, complete
from .watch import Watch

# All chosen, none measured beside other values.
FINAL_ROUNDS = 2  # turns in which chosen and baseline are measured again, each in a fresh worker
FINAL_SHARE = 1 / 3  # of --timeout, the most that finals take where one turn with contender and rivals takes no more
RIVALS = 3  # per context, the most that are measured again beside the chosen
_UNSURE = 0.3  # probability of fitting below which a baseline that waited through the search is not measured at all


def measure_finals(
    search: Search,
    trials: Trials,
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    watch: Watch,
    until: float,
    end: float,
    reloads: bool,
) -> None:
    """Chosen, contender, baseline, and again, each in a fresh worker; no baseline where it is what was chosen.

    The contender is another load group that may be as fast, where there is one and time for it before the `end` of the
    run. It has no second turn where it fell behind, or where there is only time for the others. Right after the chosen
    and the contender of a context come their rivals, in the same worker: what may be as fast, in the next turn what
    still is. Where what is left of the time `until` is less than the turns before took, there is no other. One turn
    there is as far as there is time before the `end`, with a rival for each context where it has room before that.
    """
    workload, objective = search.workload, search.workload.objective
    other = {} if reloads else contender(list(search.known.values()), workload, chosen)
    sides = {"chosen": chosen, "contender": other}
    sides = {name: {c: ours.at(c) for c, ours in side.items()} for name, side in sides.items()}
    others = _rivals(search, sides["chosen"], sides["contender"], baselines, until, end)
    if "contender" not in others:
        del sides["contender"]
    if sides["chosen"] != baselines:
        sides["baseline"] = baselines
    finals: list[Record] = []
    took = dict.fromkeys(sides, 0.0)

    def again(configuration: Configuration, context: int) -> Record:
        record = search.measure(configuration, context, "final")
        search.studies.keep(record)
        watch.record(record)
        finals.append(record)
        return record

    for turn in range(FINAL_ROUNDS):
        left = until - search.now()
        if turn and sum(took[name] for name in sides if name != "contender") / turn > left:
            watch.note(f"no time to measure the chosen again more than {turn} of {FINAL_ROUNDS} times: raise --timeout")
            return
        if turn and "contender" in sides:
            keeping_up = keeps_up(finals, sides["contender"], sides["chosen"], workload)
            if not keeping_up or sum(took.values()) / turn > left:
                del sides["contender"], took["contender"]
        if turn:
            for plan in others.values():
                for c, planned in plan.items():
                    plan[c] = [r for r in planned if r in tied(finals, r.load_group, c, objective)]
        for name, side in sides.items():
            began = search.now()
            trials.close()
            for context in sorted(side, key=lambda c: (str(side[c].load_group), c)):
                if search.now() >= end:
                    watch.note(f"no time to measure the {name} again at {context} tokens: raise --timeout")
                    return
                watch.phase(f"measuring the {name} again, {turn + 1} of {FINAL_ROUNDS}")
                ours = again(side[context], context)
                for rival in others[name][context] if name in others else []:
                    if search.now() >= end:
                        break
                    watch.phase(f"measuring what may be as fast, {turn + 1} of {FINAL_ROUNDS}")
                    if measured_alike(search, rival, context) is None:  # a look first: most are not worth more
                        look = search.measured(rival, context)
                        if look.outcome != "ok" or ours.outcome != "ok" or not near([look], [ours], objective):
                            continue
                        if search.now() >= end:
                            break
                    again(rival, context)
            took[name] += search.now() - began


def _rivals(
    search: Search,
    chosen: dict[int, Configuration],
    other: dict[int, Configuration],
    baselines: dict[int, Configuration],
    until: float,
    end: float,
) -> dict[str, dict[int, list[Configuration]]]:
    """What is measured again beside the chosen, and beside the contender where that is measured itself, per context.

    First what the other load group has learnt, then what the search found as fast and what it never measured there, in
    turns: one for each context where there is time for one turn before the `end`, then the contender and one for each
    of its contexts likewise, more where there is for all turns within `until`.
    """
    sides = {"chosen": chosen, "contender": other} if other else {"chosen": chosen}
    offers: dict[str, dict[int, list[Configuration]]] = {}
    for name, side in sides.items():
        across = {"chosen": other, "contender": chosen}[name]
        offers[name] = {}
        for context, leader in side.items():
            known = rivals(list(search.known.values()), leader, context, search.workload.objective)
            elsewhere = [c.at(context) for c in side.values() if c.load_group == leader.load_group]
            learnt = _learnt(search, leader, across.get(context), context)
            mixed = zip_longest(known, [*learnt[1:], *_untried(search, leader, elsewhere, context)])
            offered = dict.fromkeys([*learnt[:1], *(c for pair in mixed for c in pair)])
            offers[name][context] = [c for c in offered if c not in (None, baselines.get(context))]
    room = [end - search.now(), *[(until - search.now()) / FINAL_ROUNDS] * (RIVALS - 1)]
    seconds = {
        name: seconds_for(search, [(c, context) for context, c in side.items()], load=True)
        for name, side in {**sides, "baseline": baselines}.items()
    }
    spent = seconds["chosen"] + seconds["baseline"] * (chosen != baselines)
    found: dict[str, dict[int, list[Configuration]]] = {"chosen": {context: [] for context in chosen}}
    for rank in range(RIVALS):
        for name, side in sides.items():
            if name not in found:
                if spent + seconds[name] > room[rank]:
                    continue
                spent += seconds[name]
                found[name] = {context: [] for context in side}
            for context, leader in side.items():
                for offer in list(offers[name][context]):
                    looks = 1 + (measured_alike(search, offer, context) is None)
                    takes = looks * seconds_for(search, [(leader, context)])
                    if spent + takes <= room[rank]:
                        found[name][context].append(offer)
                        offers[name][context].remove(offer)
                        spent += takes
                        break
    return found


def _learnt(search: Search, leader: Configuration, across: Configuration | None, context: int) -> list[Configuration]:
    """The leader with the settings that lead with the other load group, then with the next depths of the space.

    What is known not to be near the leader here has nothing to teach. A draft is carried over unless one of the two is
    a model.
    """
    found = []
    ours, theirs = (measured_alike(search, c, context) if c is not None else None for c in (leader, across))
    behind = ours and theirs and not near([theirs], [ours], search.workload.objective)
    if across is not None and not behind:
        knobs = ["cache", "prefill_chunk", "launch"]
        if across.has_draft_model == leader.has_draft_model:
            knobs += ["depth", "speculation"] + ["draft"] * (not leader.has_draft_model)
        found.append(leader.replace(**{knob: getattr(across, knob) for knob in knobs}))
    if leader.depth:
        depths = sorted(search.space.choices.get("depth", ()))
        deeper, less = [d for d in depths if d > leader.depth], [d for d in depths if d < leader.depth]
        found += [leader.replace(depth=depth) for depth in (*deeper[:1], *less[-1:])]
    return _new(search, found, leader, context)


def _untried(
    search: Search, leader: Configuration, elsewhere: list[Configuration], context: int
) -> list[Configuration]:
    """The leader with its cache, chunks, launch or all of them stock, and what leads elsewhere; simplest first."""
    stock = {knob: getattr(Configuration(), knob) for knob in ("cache", "prefill_chunk", "launch")}
    changed = {leader.replace(**stock), *(leader.replace(**{knob: word}) for knob, word in stock.items())}
    return sorted(_new(search, {*changed, *elsewhere}, leader, context), key=lambda c: c.simplicity)


def _new(search: Search, offered: Iterable[Configuration], leader: Configuration, context: int) -> list[Configuration]:
    """What of it was not measured here, can fit and is in the space."""
    legal = [c for c in dict.fromkeys(offered) if c != leader and search.space.parameters(c) is not None]
    return [c for c in legal if measured_alike(search, c, context) is None and not search.hopeless(c, context)]


def reserve(search: Search, reloads: bool, timeout_s: float, reference_s: float) -> float:
    """Seconds that the finalists, a contender, baselines that wait and a look for each boundary will take.

    At most two fifths of the run, which takes `timeout_s`.
    """
    stock, ours, lacking = 0.0, 0.0, 0
    for context in search.workload.contexts:
        here = [r for (_, at), r in search.known.items() if at == context and r.tokens_per_s]
        sides = [r for r in here if r.stage == "baseline"], [r for r in here if r.outcome == "ok"]
        fastest = [[max(side, key=lambda r: r.tokens_per_s or 0)] if side else [] for side in sides]
        stock += sum(r.measure_s or 0 for r in fastest[0])
        ours += sum(r.measure_s or 0 for r in fastest[1])
        lacking += not sides[0]
    longest = max((r.measure_s or 0 for r in search.known.values()), default=0.0)
    load = max((r.load_s or 0 for r in search.known.values()), default=0) + 6
    chosen = choose(list(search.known.values()), search.workload, reloads)
    loads = 1 + max(1, len({configuration.load_group for configuration in chosen.values()}))
    turn = CARE_OVER_LOOK * (stock + ours) + loads * load
    rival = CARE_OVER_LOOK * ours
    other = {} if reloads else contender(list(search.known.values()), search.workload, chosen)
    if other:
        turn += seconds_for(search, [(c, context) for context, c in other.items()]) + load
    finals = max(turn + rival, min(FINAL_ROUNDS * (turn + RIVALS * rival), FINAL_SHARE * timeout_s))
    finals += lacking * (1 + FINAL_ROUNDS) * longest + bool(lacking) * load
    looks = [
        seconds_for(search, [(chosen[low], high), (chosen[high], high), (chosen[low], high)], load=True)
        for low, high in changes(chosen, search.workload)
    ]
    finals += longest  # the search's last look may begin right before its end
    return min(timeout_s * 0.4, finals + sum(looks) + (reference_s if looks else 0))


def finalists(
    search: Search, candidates: list[Configuration], reloads: bool, completing_s: float
) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    """The chosen configurations, every context of the best load group and of a near one measured, and the baselines."""
    group = best_group(search.known.values(), search.workload)
    if group is not None:
        search.deadline += completing_s
        complete(search, group)
        known, workload = list(search.known.values()), search.workload
        if not reloads and not contender(known, workload, choose(known, workload)):
            near_it = unfinished(known, workload, group)
            if near_it is not None:
                complete(search, near_it)
    if search.now() < search.deadline:
        search.baseline(candidates, sure=_UNSURE)
    chosen, baselines = choice_by_search(search, candidates, reloads)
    if not reloads and len({baseline.load_group for baseline in baselines.values()}) > 1:
        for context in chosen:  # without reloads only what fits at the longest can be kept as a baseline
            also(search, baselines[max(baselines)], context)
        return choice_by_search(search, candidates, reloads)
    return chosen, baselines


def choice_by_search(
    search: Search, candidates: list[Configuration], reloads: bool
) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    stock = {context: search.baseline_of(context, candidates) for context in search.workload.contexts}
    baselines = {context: record.configuration for context, record in stock.items() if record is not None}
    return choose(list(search.known.values()), search.workload, reloads), baselines
