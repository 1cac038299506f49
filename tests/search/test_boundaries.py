"""Where between two contexts the choice changes, on a clock and with a reference of their own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from autotune import run
from autotune.config import Budget, Configuration, Record, Workload
from autotune.policy.choice import settle
from autotune.policy.policy import Policy
from autotune.request import Request
from autotune.results import read_records
from autotune.search.boundaries import boundaries
from autotune.search.search import Search
from autotune.search.space import Space
from autotune.search.study import Studies
from autotune.trial.inputs import Inputs
from autotune.trial.process import WorkerFailed
from autotune.trial.trials import Trials
from tests.records import Notes, synthetic_record

from ..searches import HIGH, LONG, LOW, SHORT


class Formula:
    """Rates that cross at a length; a reference that is scored by doing nothing."""

    def __init__(self, cross: int, slope: float = 0.1, scored: bool = True, **outcomes: Any):
        self.cross, self.slope, self.outcomes = cross, slope, outcomes
        self.calls: list[tuple[str, int, str]] = []
        self.now = 0.0
        self.references: dict[int, str] = {}
        self.inputs = Inputs("inputs.npz", self.references)
        self.requests: list[tuple[str, int | None]] = []
        self.scored = scored

    def measure(self, configuration: Configuration, context: int, stage: str) -> Record:
        self.calls.append((configuration.cache, context, stage))
        self.now += 10
        outcome = self.outcomes.get(f"{configuration.cache}_{context}", "ok")
        certified = context in (LOW, HIGH) or context in self.references
        if certified and stage == "boundary":
            outcome = self.outcomes.get("certificate", outcome)
            assert Path(self.references[context]).exists()
        gain = 1 + self.slope * (self.cross - context) / 256
        middle = 100.0 * (gain if configuration == SHORT else 1.0)
        figures: dict[str, Any] = {"outcome": outcome, "stage": stage, "measure_s": 10.0, "load_s": 1.0}
        figures["ratio"] = 1.0 if certified else None
        return synthetic_record(configuration, context, (middle * 0.99, middle, middle * 1.01), **figures)

    def close(self) -> None:
        pass

    def uncapped(self) -> "Formula":
        return self

    kill = close

    def request(self, op: str, timeout_s: float, **data: Any) -> dict[str, Any]:
        self.requests.append((op, data.get("context")))
        if not self.scored:
            raise WorkerFailed("out_of_memory", "no room")
        if op == "reference":
            Path(data["path"]).write_text("logits")
        return {"how": "on the device"}


class Looked:
    """A run that has measured its contexts and goes on to look between them."""

    def __init__(
        self,
        folder: Path,
        formula: Formula,
        *,
        seconds: float = 1e6,
        chosen: dict[int, Configuration] | None = None,
        fits: Callable[[Configuration, int], str] = lambda configuration, context: "",
    ):
        self.formula, self.watch = formula, Notes()
        chosen = {LOW: SHORT, HIGH: LONG} if chosen is None else chosen
        workload = Workload(contexts=(LOW, HIGH))
        space = Space({"cache": ("static", "dynamic")})
        request = Request(folder, Budget(10**9), workload=workload, space=space, space_name="mine", out=folder)
        request.timeout_s, request.started = seconds, formula.now
        info = {
            "identity": {"model": {"path": "m", "weights_sha256": "a", "tokenizer_sha256": "b"}, "drafts": []},
            "space": "mine",
        }
        info |= {"reference": {"weights": "bf16", "took_s": 5.0}, "study": request.study, "storage": None}
        info |= {"text": {"tokens_sha256": "t"}, "environment": {"device": "d", "versions": {}}}
        info |= {"workload": dataclasses.asdict(workload), "budget": dataclasses.asdict(request.budget)}
        studies = Studies(run._url(request), request.study, {}, workload.contexts, 0)
        self.search = Search(
            space=space,
            workload=workload,
            budget=request.budget,
            studies=studies,
            measure=formula.measure,
            fits=fits,
            deadline=0.0,
        )
        for record in read_records(run._url(request), request.study):
            self.search.known[record.configuration, record.context_tokens] = record
        for context in (LOW, HIGH):
            for configuration in dict.fromkeys([SHORT, LONG, *chosen.values()]):
                self.search.measured(configuration, context)
        self.before = len(formula.calls)
        formula.now = request.started
        trials = Trials(str(folder), workload, request.budget, folder)
        trials.inputs = formula.inputs
        trials.uncapped = lambda: formula  # type: ignore[assignment, method-assign, return-value]
        standing = settle(read_records(run._url(request), request.study), chosen, {}, workload)
        self.found = boundaries(self.search, trials, standing, seconds - 5, ("bf16", {}), self.watch)
        (folder / "run.json").write_text(json.dumps(info))
        self.policy: Policy | None = run.conclude(folder, chosen | self.found, {})

    @property
    def looks(self) -> list[tuple[str, int, str]]:
        return self.formula.calls[self.before :]

    @property
    def ends(self) -> list[int]:
        assert self.policy is not None
        return [rule.max_context_tokens for rule in self.policy.rules]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Formula], Formula]:
    """Time passes as the formula measures, and not otherwise; no reference was scored before."""
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "references"))

    def of(formula: Formula) -> Formula:
        monkeypatch.setattr("time.monotonic", lambda: formula.now)
        return formula

    return of


@pytest.mark.parametrize(
    ("cross", "end", "tried"),
    [(800, 768, [1536, 1024, 768]), (1400, 1280, [1536, 1024, 1280]), (2500, 2304, [1536, 2048, 2304])],
)
def test_where_the_choice_changes_is_found_by_halving_and_certified_with_quality(
    tmp_path: Path, clock: Any, cross: int, end: int, tried: list[int]
) -> None:
    looked = Looked(tmp_path, clock(Formula(cross)))
    assert looked.found == {end: SHORT}
    expected = [(cache, length, "boundary") for length in tried for cache in ("static", "dynamic")]
    assert looked.looks == [*expected, ("static", end, "boundary")]
    assert looked.formula.requests == [("load_reference", None), ("reference", end)]
    assert looked.ends == [LOW, end, HIGH]
    assert looked.policy is not None
    assert looked.policy.rules[1].expected.perplexity_ratio == 1.0
    assert looked.policy.configuration(looked.policy.rules[1]) == SHORT
    assert f"the change lies between {end} and {end + 256} tokens" in looked.policy.rules[2].note
    assert list(tmp_path.glob("reference-*.npy")) == []


def test_the_report_tells_the_importances_of_the_study(tmp_path: Path, clock: Any, monkeypatch: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run, "importances", lambda *given: asked.append(given) or {LOW: {"launch": 0.625}})
    Looked(tmp_path, clock(Formula(1400)))
    assert asked == [(f"sqlite:///{tmp_path / 'study.db'}", f"autotune-{tmp_path.name}", (LOW, HIGH))]
    assert "launch 62 %" in (tmp_path / "report.html").read_text("utf-8")


def test_a_policy_with_boundaries_is_rebuilt_from_what_is_stored_and_they_are_in_the_table(
    tmp_path: Path, clock: Any
) -> None:
    looked = Looked(tmp_path, clock(Formula(1400)))
    assert run.conclude(tmp_path) == looked.policy
    table = pd.read_csv(tmp_path / "trials.csv")
    assert set(table[table["stage"] == "boundary"]["context_tokens"]) == {1024, 1280, 1536}
    again = Looked(tmp_path, clock(Formula(1400)))
    assert (again.looks, again.ends) == ([], looked.ends)


def test_a_tie_ends_the_search_for_a_boundary_there(tmp_path: Path, clock: Any) -> None:
    looked = Looked(tmp_path, clock(Formula(1536)))
    assert [length for _, length, _ in looked.looks] == [1536] * 3
    assert looked.ends == [LOW, 1536, HIGH]


def test_a_change_right_after_the_context_needs_no_rule_of_its_own(tmp_path: Path, clock: Any) -> None:
    looked = Looked(tmp_path, clock(Formula(600)))
    assert looked.ends == [LOW, HIGH]
    assert looked.formula.requests == []
    assert looked.policy is not None
    assert "the change lies between 512 and 768 tokens" in looked.policy.rules[1].note


@pytest.mark.parametrize(
    ("outcomes", "end"),
    [
        ({"static_1536": "over_budget", "static_2048": "over_budget"}, 1280),
        ({"dynamic_1536": "wrong_output"}, 2304),
        ({"static_1536": "wrong_output", "dynamic_1536": "wrong_output"}, 1280),
    ],
)
def test_a_rule_does_not_reach_to_where_its_settings_fail_nor_begin_where_the_next_ones_do(
    tmp_path: Path, clock: Any, outcomes: dict[str, str], end: int
) -> None:
    assert Looked(tmp_path, clock(Formula(5000, **outcomes))).ends == [LOW, end, HIGH]


def test_what_the_plan_excludes_is_not_measured_between_contexts(tmp_path: Path, clock: Any) -> None:
    looked = Looked(tmp_path, clock(Formula(5000)), fits=lambda c, length: "too large" if 2560 > length > 1100 else "")
    assert {length for _, length, _ in looked.looks} == {1024}
    assert looked.ends == [LOW, 1024, HIGH]


def test_a_boundary_whose_quality_is_not_kept_is_none(tmp_path: Path, clock: Any) -> None:
    looked = Looked(tmp_path, clock(Formula(1400, certificate="quality_loss")))
    assert looked.looks[-1] == ("static", 1280, "boundary")
    assert looked.ends == [LOW, HIGH]


def test_without_a_reference_there_is_no_boundary_between_contexts(tmp_path: Path, clock: Any) -> None:
    looked = Looked(tmp_path, clock(Formula(1400, scored=False)))
    assert looked.ends == [LOW, HIGH]
    assert "no room" in looked.watch.notes[0]


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 0), (50.0, 1), (70.0, 2), (1000.0, 3)])
def test_boundaries_are_looked_for_in_the_time_that_is_left(
    tmp_path: Path, clock: Any, seconds: float, steps: int
) -> None:
    formula = clock(Formula(2500))
    looked = Looked(tmp_path, formula, seconds=seconds)
    assert len({length for _, length, _ in looked.looks}) == steps
    assert formula.now <= seconds - 5 * (steps > 0)  # what the reference takes
    assert looked.policy is not None
    assert ("was not measured" in looked.policy.rules[-1].note) == (steps == 0)


@pytest.mark.parametrize("other", [SHORT, Configuration(weights="bnb-nf4"), None])
def test_nothing_is_looked_for_between_equal_choices_different_loads_or_where_one_is_missing(
    tmp_path: Path, clock: Any, other: Configuration | None
) -> None:
    chosen = {LOW: SHORT} if other is None else {LOW: SHORT, HIGH: other}
    looked = Looked(tmp_path, clock(Formula(1400)), chosen=chosen)
    assert (looked.looks, looked.found) == ([], {})
