"""Which measurements the finals make of what a search found, by a measurement that is a formula and takes 10 s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from autotune.config import Budget, Configuration, Record, Workload
from autotune.policy.choice import settle
from autotune.results import read_records
from autotune.search.finals import _learnt, _rivals, finalists, measure_finals, reserve
from autotune.search.search import Search
from autotune.search.space import Space
from autotune.search.study import Studies
from tests.records import Notes, synthetic_record

from ..searches import HIGH, LOW, searching

LEADER = Configuration(weights="bnb-nf4", cache="static", prefill_chunk=256)
STOCK = Configuration(weights="bf16")
RIVAL, FAR = LEADER.replace(cache="quantized-8"), LEADER.replace(cache="quantized-8", prefill_chunk=0)
CHUNKS, WHOLE = LEADER.replace(cache="dynamic"), LEADER.replace(prefill_chunk=0)
PLAIN = LEADER.replace(cache="dynamic", prefill_chunk=0)
NAMES = {LEADER: "leader", STOCK: "stock", RIVAL: "rival", FAR: "far", CHUNKS: "chunks", WHOLE: "whole", PLAIN: "plain"}
RATES = {LEADER: 100.0, STOCK: 50.0, RIVAL: 98.5, FAR: 70.0, CHUNKS: 98.0, WHOLE: 99.0, PLAIN: 60.0}
DRAFTED = LEADER.replace(draft="prompt-lookup", depth=4)  # what the contender does, with the chosen load
CONTENDER = DRAFTED.replace(weights="quanto-int8")
ALONE, DEEPER, LESS = CONTENDER.replace(draft="none"), CONTENDER.replace(depth=6), CONTENDER.replace(depth=2)
NAMES |= {DRAFTED: "drafted", CONTENDER: "contender", ALONE: "alone", DEEPER: "deeper", LESS: "less"}
RATES |= {DRAFTED: 60.0, CONTENDER: 99.0, ALONE: 60.0, DEEPER: 99.5, LESS: 60.0}


class Finals:
    """Finals of a search that knows LEADER, RIVAL, FAR and STOCK; all that takes time are measurements, 10 s each."""

    def __init__(
        self,
        folder: Path,
        until: float,
        *,
        end: float = 0.0,
        turn: float = 20.0,
        takes: float = 10.0,
        contexts: tuple[int, ...] = (512,),
        looks: dict[Configuration, float] | None = None,
        again: dict[Configuration, float] | None = None,
        chosen: Configuration = LEADER,
        stock: Configuration = STOCK,
        known: tuple[Configuration, ...] = (LEADER, RIVAL, FAR, STOCK),
        caches: tuple[str, ...] = ("dynamic", "static", "quantized-8"),
        fits: Callable[[Configuration, int], str] = lambda configuration, context: "",
        failing: Configuration | None = None,
        reloads: bool = False,
    ):
        self.url = f"sqlite:///{folder / 'study.db'}"
        self.calls: list[tuple[str, int, str]] = []
        self.now, self.watch, self.trials = 0.0, Notes(), Mock()
        searched = RATES | (looks or {})
        rates = searched | (again or {})

        def measure(configuration: Configuration, context: int, stage: str) -> Record:
            self.calls.append((NAMES.get(configuration, "another"), context, stage))
            self.now += takes if stage == "final" else 10
            rate = (rates if stage == "final" else searched).get(configuration, 10.0)
            outcome = "wrong_output" if stage == "final" and configuration == failing else "ok"
            figures: dict[str, Any] = {"measure_s": 10 / 1.1, "load_s": 0.0, "stage": stage, "outcome": outcome}
            return synthetic_record(configuration, context, (rate * 0.99, rate, rate * 1.01), **figures)

        words = {"weights": ("bf16", "bnb-nf4", "quanto-int8"), "draft": ("none", "prompt-lookup"), "depth": (2, 4, 6)}
        space = Space({**words, "cache": caches, "prefill_chunk": (0, 256)})
        studies = Studies(self.url, "run", {}, contexts, 0)
        workload = Workload(contexts=contexts)
        self.search = Search(
            space=space,
            workload=workload,
            budget=Budget(10**9),
            studies=studies,
            measure=measure,
            fits=fits,
            deadline=0.0,
            now=lambda: self.now,
        )
        for context in contexts:
            for configuration in known:
                self.search.measured(configuration, context, "baseline" if configuration == stock else "search")
        self.calls.clear()
        self.now = 0.0
        self.sides = dict.fromkeys(contexts, chosen), dict.fromkeys(contexts, stock)
        trials: Any = self.trials
        measure_finals(
            self.search, trials, *self.sides, self.watch, until, max(end, until, turn * len(contexts)), reloads
        )

    @property
    def names(self) -> list[str]:
        """What was measured, a look with a question mark."""
        return [name + "?" * (stage == "search") for name, _, stage in self.calls]

    @property
    def settled(self) -> dict[int, Configuration]:
        return settle(read_records(self.url, "run"), *self.sides, self.search.workload)


FIRST = ["leader", "rival", "plain?", "chunks?", "chunks", "stock"]


def test_rivals_and_simpler_variants_are_measured_after_the_chosen_and_the_next_turn_repeats_what_still_stands(
    tmp_path: Path,
) -> None:
    finals = Finals(tmp_path, 1000.0)
    assert finals.names == [*FIRST, "leader", "rival", "chunks", "stock"]
    assert finals.trials.close.call_count == 4
    assert len(finals.search.studies.extra.trials) == 8  # the finals; a look is a trial of the search
    assert finals.watch.notes == []


def test_a_rival_that_falls_behind_or_fails_when_it_is_measured_again_is_not_in_the_next_turn(tmp_path: Path) -> None:
    slower = Finals(tmp_path, 1000.0, again={RIVAL: 80.0})
    assert slower.names == [*FIRST, "leader", "chunks", "stock"]
    (tmp_path / "study.db").unlink()
    failing = Finals(tmp_path, 1000.0, failing=RIVAL)
    assert failing.names == [*FIRST, "leader", "chunks", "stock"]


# a worker's start counts 6 s, so that a turn of chosen and baseline is expected to take 32 s
@pytest.mark.parametrize(
    ("until", "names"),
    [
        (0.0, ["leader", "stock"]),
        (41.9, ["leader", "stock", "leader", "stock"]),
        (42.0, ["leader", "rival", "stock"]),
        (60.0, ["leader", "rival", "stock", "leader", "rival", "stock"]),
        (123.9, ["leader", "rival", "stock", "leader", "rival", "stock"]),
        (124.0, ["leader", "rival", "plain?", "stock", "leader", "rival", "stock"]),
    ],
)
def test_a_turn_has_one_rival_where_it_has_the_time_and_more_where_all_turns_have(
    tmp_path: Path, until: float, names: list[str]
) -> None:
    finals = Finals(tmp_path, until)
    assert finals.names == names
    assert bool(finals.watch.notes) == (names.count("leader") == 1)


@pytest.mark.parametrize(("end", "names"), [(19.9, ["leader", "stock"]), (10.0, ["leader"]), (0.0, [])])
def test_no_final_begins_after_the_end_of_the_run(tmp_path: Path, end: float, names: list[str]) -> None:
    finals = Finals(tmp_path, 0.0, end=end, turn=0.0)
    assert finals.names == names
    told = {19.9: "chosen again more than 1 of 2 times", 10.0: "baseline again at 512 tokens"}
    lacking = told.get(end, "chosen again at 512 tokens")
    assert finals.watch.notes == [f"no time to measure the {lacking}: raise --timeout"]
    assert set(finals.settled) == {512}


@pytest.mark.parametrize(
    ("takes", "names"), [(500.0, FIRST[:2]), (490.0, FIRST[:4]), (489.0, FIRST[:5]), (1000.0, FIRST[:1])]
)
def test_no_rival_begins_after_the_end_where_finals_take_longer_than_their_looks_did(
    tmp_path: Path, takes: float, names: list[str]
) -> None:
    finals = Finals(tmp_path, 1000.0, takes=takes)
    assert finals.names == names
    assert finals.watch.notes == ["no time to measure the baseline again at 512 tokens: raise --timeout"]


def test_one_rival_for_each_context_has_until_the_end_of_the_run(tmp_path: Path) -> None:
    assert Finals(tmp_path, 10.0, end=41.9).names == ["leader", "stock"]
    (tmp_path / "study.db").unlink()
    assert Finals(tmp_path, 10.0, end=42.0).names == ["leader", "rival", "stock"]


def test_each_context_has_its_first_rival_before_any_has_a_second(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 72.0, contexts=(512, 1024))
    first = [(name, context) for name, context, _ in finals.calls]
    both = [("leader", 512), ("rival", 512), ("leader", 1024), ("rival", 1024), ("stock", 512), ("stock", 1024)]
    assert first == both
    (tmp_path / "study.db").unlink()
    finals = Finals(tmp_path, 224.0, contexts=(512, 1024))
    assert finals.names[:8] == [*FIRST[:3], *FIRST[:3], "stock", "stock"]


def test_the_baseline_is_no_rival_and_what_the_space_leaves_out_no_variant(tmp_path: Path) -> None:
    assert Finals(tmp_path, 1000.0, stock=RIVAL).names[:6] == ["leader", *FIRST[2:5], "whole?", "whole"]
    (tmp_path / "study.db").unlink()
    without = Finals(tmp_path, 1000.0, caches=("static", "quantized-8"))
    assert without.names[:5] == ["leader", "rival", "whole?", "whole", "stock"]


def test_what_cannot_fit_is_no_variant_and_chunks_that_a_prompt_fits_are_the_same_thing(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 1000.0, fits=lambda c, context: "too large" if c in (PLAIN, CHUNKS) else "")
    assert finals.names[:5] == ["leader", "rival", "whole?", "whole", "stock"]
    (tmp_path / "study.db").unlink()
    short = Finals(tmp_path, 1000.0, contexts=(256,))  # here LEADER is WHOLE, RIVAL is FAR, CHUNKS is PLAIN
    assert short.names == ["whole", "far", "plain?", "stock", "whole", "stock"]
    (tmp_path / "study.db").unlink()
    known = Finals(tmp_path, 1000.0, contexts=(256,), known=(LEADER, RIVAL, STOCK), again={FAR: 99.0})
    assert known.names[:3] == ["whole", "far", "plain?"]


def test_what_leads_at_another_context_is_tried_here_too(tmp_path: Path) -> None:
    search = Finals(tmp_path, 0.0).search
    search.known.clear()
    for configuration, context in ((FAR, 512), (LEADER, 1024), (FAR, 1024)):
        rate = RATES[configuration]
        search.known[configuration, context] = synthetic_record(configuration, context, (0.99 * rate, rate))
    found = _rivals(search, {512: FAR, 1024: LEADER}, {}, {}, 1e6, 1e6)["chosen"]
    assert [NAMES[c] for c in found[512]] == ["plain", "leader"]
    assert [NAMES[c] for c in found[1024]] == ["plain", "chunks", "whole"]  # FAR was measured there, and is not near
    reloading = _rivals(search, {512: FAR, 1024: STOCK}, {}, {}, 1e6, 1e6)["chosen"]
    assert [NAMES[c] for c in reloading[512]] == ["plain"]


def test_a_baseline_that_was_chosen_is_measured_once_a_turn(tmp_path: Path) -> None:
    assert Finals(tmp_path, 1000.0, chosen=STOCK, known=(STOCK,)).names == ["stock"] * 2


@pytest.mark.parametrize(("until", "turns"), [(39.9, 1), (40.0, 2)])
def test_finals_end_where_another_turn_would_take_more_than_the_time(tmp_path: Path, until: float, turns: int) -> None:
    finals = Finals(tmp_path, until)
    assert finals.names == ["leader", "stock"] * turns
    assert finals.now <= max(until, 20.0)
    assert bool(finals.watch.notes) == (turns == 1)


BOTH = (LEADER, RIVAL, STOCK, CONTENDER)
BESIDE = ["contender", "alone?", "deeper?", "deeper", "less?"]


def test_a_contender_is_measured_between_chosen_and_baseline_and_each_load_tries_what_the_other_has_learnt(
    tmp_path: Path,
) -> None:
    finals = Finals(tmp_path, 1000.0, known=BOTH)
    first = ["leader", "drafted?", "rival", "plain?", *BESIDE, "stock"]
    assert finals.names == [*first, "leader", "rival", "contender", "deeper", "stock"]
    assert finals.trials.close.call_count == 6
    assert finals.settled == {512: LEADER}  # a tie, and the simpler load
    assert finals.watch.notes == []


@pytest.mark.parametrize("slower", [{CONTENDER: 95.0, DEEPER: 95.0}, {CONTENDER: 60.0, DEEPER: 60.0}])
def test_a_contender_that_is_slower_when_it_is_measured_again_is_not_in_the_next_turn(
    tmp_path: Path, slower: dict[Configuration, float]
) -> None:
    finals = Finals(tmp_path, 1000.0, known=BOTH, again=slower)
    assert finals.names[-3:] == ["leader", "rival", "stock"]
    assert finals.names.count("contender") == 1
    assert finals.settled == {512: LEADER}


def test_a_contender_that_is_faster_in_the_finals_is_what_is_loaded(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 1000.0, known=BOTH, again={CONTENDER: 120.0, DEEPER: 90.0})
    assert finals.settled == {512: CONTENDER}


def test_what_the_contender_does_is_tried_with_the_chosen_load_and_wins_where_it_is_faster(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 1000.0, known=BOTH, looks={DRAFTED: 150.0})
    assert finals.names[:3] == ["leader", "drafted?", "drafted"]
    assert finals.names.count("drafted") == 2
    assert finals.settled == {512: DRAFTED}


def test_a_depth_next_to_the_leaders_is_looked_at_and_wins_where_it_is_faster(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 1000.0, chosen=CONTENDER, known=(CONTENDER, STOCK), looks={DEEPER: 150.0})
    assert finals.names[:4] == ["contender", "deeper?", "deeper", "less?"]
    assert finals.settled == {512: DEEPER}


# a turn of chosen and baseline is expected to take 32 s, of the contender 16 s more, a rival that is new 20 s
@pytest.mark.parametrize(
    ("until", "end", "names"),
    [
        (0.0, 57.9, ["leader", "drafted?", "stock"]),
        (0.0, 51.9, ["leader", "rival", "stock"]),
        (0.0, 68.0, ["leader", "drafted?", "contender", "stock"]),
        (69.9, 0.0, ["leader", "drafted?", "contender", "stock"]),
        (70.0, 0.0, ["leader", "drafted?", "contender", "stock", "leader", "stock"]),
        (79.9, 0.0, ["leader", "drafted?", "contender", "stock", "leader", "stock"]),
        (80.0, 0.0, ["leader", "drafted?", "contender", "stock", "leader", "contender", "stock"]),
        (88.0, 0.0, ["leader", "drafted?", "contender", "alone?", "stock", "leader", "stock"]),
    ],
)
def test_a_contender_comes_after_one_rival_each_and_leaves_chosen_and_baseline_their_second_turn(
    tmp_path: Path, until: float, end: float, names: list[str]
) -> None:
    finals = Finals(tmp_path, until, end=end, known=BOTH)
    assert finals.names == names
    assert bool(finals.watch.notes) == (names.count("leader") == 1)


def test_with_reloads_or_without_another_load_that_is_near_there_is_no_contender(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 1000.0, known=BOTH, reloads=True)
    assert finals.names == [*FIRST, "leader", "rival", "chunks", "stock"]
    (tmp_path / "study.db").unlink()
    slower = Finals(tmp_path, 1000.0, known=BOTH, looks={CONTENDER: 89.0})
    assert slower.names == [*FIRST, "leader", "rival", "chunks", "stock"]


def test_a_contender_is_measured_at_every_context_after_the_chosen_has_a_rival_at_each(tmp_path: Path) -> None:
    finals = Finals(tmp_path, 0.0, end=118.0, contexts=(512, 1024), known=BOTH)
    beside, sides = ["drafted", "drafted"], ["leader", "contender", "stock"]
    measured = [call for call in finals.calls if call[0] in sides]
    assert measured == [(name, context, "final") for name in sides for context in (512, 1024)]
    assert [name for name, *_ in finals.calls if name not in sides] == beside
    (tmp_path / "study.db").unlink()
    assert "contender" not in Finals(tmp_path, 0.0, end=117.9, contexts=(512, 1024), known=BOTH).names


@pytest.mark.parametrize(
    ("leader", "across", "offered"),
    [
        (LEADER, CONTENDER, [DRAFTED]),
        (DRAFTED, CONTENDER, [DRAFTED.replace(depth=6), DRAFTED.replace(depth=2)]),
        (DRAFTED, None, [DRAFTED.replace(depth=6), DRAFTED.replace(depth=2)]),
        (DRAFTED.replace(depth=6), CONTENDER, [DRAFTED]),  # the other's is also the next
        (DRAFTED, ALONE.replace(cache="dynamic"), [CHUNKS, DRAFTED.replace(depth=6), DRAFTED.replace(depth=2)]),
        (LEADER, CONTENDER.replace(draft="/models/draft"), []),  # a draft model is a load of its own
        (LEADER, CONTENDER.replace(draft="/models/draft", cache="dynamic"), [CHUNKS]),
    ],
)
def test_settings_are_carried_over_to_the_other_load_and_then_depths_go_one_up_and_one_down(
    tmp_path: Path, leader: Configuration, across: Configuration | None, offered: list[Configuration]
) -> None:
    search = Finals(tmp_path, 0.0, known=(LEADER, STOCK)).search
    assert _learnt(search, leader, across, 512) == offered


@pytest.mark.parametrize(("rate", "offered"), [(99.0, [DRAFTED]), (80.0, [])])
def test_what_is_slower_with_the_other_load_is_not_carried_over(
    tmp_path: Path, rate: float, offered: list[Configuration]
) -> None:
    search = Finals(tmp_path, 0.0, known=(LEADER, STOCK, CONTENDER), looks={CONTENDER: rate}).search
    assert _learnt(search, LEADER, CONTENDER, 512) == offered


@pytest.mark.parametrize(
    ("timeout_s", "reloads", "expected"),
    [
        (10_000.0, False, 2 * (48 + 3 * 10)),  # two turns of 48 s with three rivals each
        (10_000.0, True, 2 * (32 + 3 * 10)),
        (160.0, False, 58.0),  # one turn with one rival takes more than a third
        (110.0, False, 58.0),
    ],
)
def test_the_search_leaves_the_finals_time_for_a_contender(
    tmp_path: Path, timeout_s: float, reloads: bool, expected: float
) -> None:
    finals = Finals(tmp_path, 0.0, known=(LEADER, STOCK, CONTENDER))
    assert reserve(finals.search, reloads, timeout_s, 5.0) == pytest.approx(min(expected + 10 / 1.1, 0.4 * timeout_s))


@pytest.mark.parametrize(
    ("timeout_s", "expected"),
    [
        (10_000.0, 2 * (32 + 3 * 10)),  # two turns of 32 s with three rivals each
        (150.0, 50.0),  # a third
        (110.0, 42.0),  # one turn with one rival takes more than a third
    ],
)
def test_the_search_leaves_the_finals_their_time_and_its_own_last_look(
    tmp_path: Path, timeout_s: float, expected: float
) -> None:
    finals = Finals(tmp_path, 0.0, known=(LEADER, STOCK))
    assert reserve(finals.search, False, timeout_s, 5.0) == pytest.approx(min(expected + 10 / 1.1, 0.4 * timeout_s))


@pytest.mark.parametrize("reloads", [False, True])
def test_what_is_stock_at_the_longest_context_is_measured_at_the_others_for_they_may_have_to_share_it(
    tmp_path: Path, reloads: bool
) -> None:
    large, small, fast = Configuration(), Configuration(weights="bnb-nf4"), Configuration(weights="quanto-int4")

    def measure(configuration: Configuration, context: int, stage: str) -> Record:
        outcome = "over_budget" if (configuration, context) == (large, HIGH) else "ok"
        return synthetic_record(configuration, context, outcome=outcome, stage=stage)  # type: ignore[arg-type]

    search = searching(tmp_path, measure)
    search.baseline([large, small])
    for context in (LOW, HIGH):
        search.measured(fast, context)
    chosen, baselines = finalists(search, [large, small], reloads, 60)
    assert baselines == {LOW: large, HIGH: small}
    assert ((small, LOW) in search.known) == (not reloads)
    assert set(chosen) == {LOW, HIGH}


@pytest.mark.parametrize(("rate", "reloads"), [(98.0, False), (98.0, True), (80.0, False)])
def test_a_load_near_the_best_is_measured_at_the_contexts_that_it_lacks(
    tmp_path: Path, rate: float, reloads: bool
) -> None:
    fast, other = Configuration(weights="quanto-int4"), Configuration(weights="bnb-nf4")

    def measure(configuration: Configuration, context: int, stage: str) -> Record:
        rates = (100.0,) * 3 if configuration == fast else (rate,) * 3
        return synthetic_record(configuration, context, rates, stage=stage)

    search = searching(tmp_path, measure)
    for configuration, context in ((fast, LOW), (fast, HIGH), (other, LOW)):
        search.measured(configuration, context)
    finalists(search, [], reloads, 60)
    assert ((other, HIGH) in search.known) == (rate > 90 and not reloads)
