"""What is learnt from runs in the folders beside; they are written here, not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.config import MIB, Configuration, Record
from autotune.results import frame
from autotune.search.earlier import Earlier, earlier_runs, learnt_from
from tests.records import synthetic_record
from tests.searches import CONTEXTS, DRAFT, MIXED, Fake, rate, search_in

INFO: dict[str, Any] = {
    "drafts": [DRAFT],
    "environment": {"device": "a GPU", "full_precision": "bf16"},
    "identity": {"model": {"weights_sha256": "m"}, "drafts": [{"weights_sha256": "d"}]},
}
STATIC = Configuration(cache="static")
DRAFTED = Configuration(draft="/elsewhere/draft", draft_weights="bf16", depth=4)


def info_of(model: str = "m", draft: str = "d", device: str = "a GPU") -> dict[str, Any]:
    return {
        "workload": {"new_tokens": 100},
        "budget": {},
        "study": "",
        "storage": None,
        "drafts": ["/elsewhere/draft"],
        "environment": {"device": device, "full_precision": "bf16"},
        "identity": {"model": {"weights_sha256": model}, "drafts": [{"weights_sha256": draft}]},
    }


def written(folder: Path, records: list[Record], **said: Any) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(info_of(**said)))
    frame(records).to_csv(folder / "trials.csv", index=False)
    return folder


def found(folder: Path, predicted: int = 500 * MIB) -> tuple[tuple[Earlier, ...], int]:
    return earlier_runs(folder / "run", INFO, MIXED, lambda configuration, context: predicted)


def test_records_are_read_as_they_were_written_with_this_runs_draft(tmp_path: Path) -> None:
    failed = Record(STATIC, 256, "out_of_memory", "12 MiB, more than the budget")
    outside = Configuration(attention="split_kv")
    records = [synthetic_record(c, 64, spread=0.02, base_bytes=7) for c in (STATIC, DRAFTED, outside)]
    written(tmp_path / "one", [*records, failed])
    written(tmp_path / "run", records)  # this one itself
    (run,), left_out = found(tmp_path)
    assert (run.folder.name, run.same, run.new_tokens, left_out) == ("one", True, 100, 0)
    assert [(r.configuration, r.context_tokens, r.outcome) for r in run.records] == [
        (STATIC, 64, "ok"),
        (DRAFTED.replace(draft=DRAFT), 64, "ok"),
        (STATIC, 256, "out_of_memory"),
    ]
    for name in ("tokens_per_s", "decode_tokens_per_s", "ttft_s", "spread", "peak_bytes", "base_bytes"):
        assert getattr(run.records[0], name) == pytest.approx(getattr(records[0], name))
        assert getattr(run.records[2], name) is None


def test_a_draft_that_is_not_here_is_left_out(tmp_path: Path) -> None:
    written(tmp_path / "one", [synthetic_record(c, 64) for c in (STATIC, DRAFTED)], draft="another")
    (run,), _ = found(tmp_path)
    assert [record.configuration for record in run.records] == [STATIC]


def test_another_model_counts_where_it_needs_about_as_much(tmp_path: Path) -> None:
    written(tmp_path / "one", [synthetic_record(STATIC, 64)], model="tuned")
    written(tmp_path / "two", [synthetic_record(STATIC, 64)])
    runs, _ = found(tmp_path, predicted=400 * MIB)
    assert [(run.folder.name, run.same) for run in runs] == [("two", True), ("one", False)]
    line = learnt_from(*found(tmp_path, predicted=400 * MIB))
    assert "1 measurements of this model (two) and 1 measurements of a model of its size (one); --no-warm" in line
    assert found(tmp_path, predicted=300 * MIB) == ((), 2)
    assert found(tmp_path, predicted=800 * MIB) == ((), 2)
    assert "nothing to learn from; 2 left out" in learnt_from((), 2)
    assert learnt_from((), 0) == ""


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("run.json", replaced("{", "[")),
        ("run.json", replaced('"a GPU"', '"another GPU"')),
        ("run.json", replaced('"bf16"', '"fp32"')),
        ("run.json", replaced('"environment"', '"surroundings"')),
        ("run.json", replaced('"environment": {', '"environment": 3, "other": {')),
        ("run.json", replaced('"identity": {', '"identity": [], "other": {')),
        ("run.json", replaced('"new_tokens": 100', '"new_tokens": "many"')),
        ("trials.csv", Path.unlink),
        ("trials.csv", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("trials.csv", replaced("tokens_per_s", "speed")),
        ("trials.csv", replaced("\n64,ok", "\n64,great")),
        ("trials.csv", replaced("\n64,ok", "\n0,ok")),
        ("trials.csv", replaced("\n64,ok", "\nfar,ok")),
        ("trials.csv", replaced("500.0", "inf")),
        ("trials.csv", replaced("500.0", "-500.0")),
        ("trials.csv", replaced("500.0", "nan")),
    ],
)
def test_a_folder_that_cannot_be_used_is_left_out_and_counted(
    tmp_path: Path, name: str, broken: Callable[[Path], None]
) -> None:
    folder = written(tmp_path / "one", [synthetic_record(STATIC, 64, (500.0,) * 3)])
    assert len(found(tmp_path)[0]) == 1
    broken(folder / name)
    assert found(tmp_path) == ((), 1)
    (folder / "run.json").unlink()  # then it is no run
    assert found(tmp_path) == ((), 0)


def test_most_records_of_other_runs_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.search.earlier._RECORDS", 3)
    for name in ("one", "two", "three"):
        written(tmp_path / name, [synthetic_record(STATIC, context) for context in (64, 256)])
    runs, left_out = found(tmp_path)
    assert (sum(len(run.records) for run in runs), left_out) == (3, 0)


def earlier_of(configurations: list[Configuration], times: float = 1.0, same: bool = True) -> Earlier:
    records = [
        synthetic_record(c, context, (times * rate(c, context),) * 3) for c in configurations for context in (50, 300)
    ]
    return Earlier(Path("one"), same, 100, tuple(records))


BEST = Configuration(
    weights="quanto-int4", draft=DRAFT, draft_weights="bf16", depth=4, cache="static", launch="graph", prefill_chunk=32
)
KNOWN = [Configuration(), Configuration(weights="quanto-int4", cache="static"), BEST, BEST.replace(cache="dynamic")]


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("times", [0.5, 1.0, 1.5])
def test_the_search_begins_with_what_was_fastest_before(tmp_path: Path, times: float) -> None:
    measure = Fake(load_s=4.0)
    search_in(tmp_path, MIXED, measure, max_trials=2, earlier=(earlier_of(KNOWN, times),)).run()
    assert measure.calls[0][0] == BEST
    assert {c.load_group for c, _ in measure.calls} == {BEST.load_group}
    cold = Fake(load_s=4.0)
    search_in(tmp_path, MIXED, cold, max_trials=2).run()
    assert BEST not in [c for c, _ in cold.calls]


@pytest.mark.usefixtures("in_memory")
def test_a_measurement_outweighs_what_an_earlier_run_says(tmp_path: Path) -> None:
    wrong = Earlier(Path("one"), True, 100, (synthetic_record(STATIC, 64, (900.0,) * 3), synthetic_record(BEST, 64)))
    search = search_in(tmp_path, MIXED, Fake(), earlier=(wrong,))
    pairs = search._pairs
    at = pairs.pool.index[STATIC, 64]
    before = pairs.rate.mean[at] - pairs.rate.mean[pairs.pool.index[BEST, 64]]
    for configuration in (STATIC, BEST):
        search.measured(configuration, 64)
    pairs.learn()
    after = pairs.rate.mean[at] - pairs.rate.mean[pairs.pool.index[BEST, 64]]
    assert before > 1.5
    assert after < 0 < pairs.rate.deviation[at] < 0.05
    assert {pair[0] for pair in search.known} == {STATIC, BEST}  # nothing of it is taken for measured here


@pytest.mark.usefixtures("in_memory")
def test_runs_that_differ_by_a_factor_are_one_after_the_other_brought_together(tmp_path: Path) -> None:
    runs = (earlier_of(KNOWN), earlier_of([*KNOWN, STATIC], times=3.0, same=False))
    beliefs = [search_in(tmp_path, MIXED, Fake(), earlier=some)._pairs for some in (runs[:1], runs)]
    for configuration in KNOWN:
        means = [pairs.rate.mean[pairs.pool.index[configuration, 64]] for pairs in beliefs]
        assert means[1] == pytest.approx(means[0], abs=0.05)


@pytest.mark.usefixtures("in_memory")
def test_peaks_of_the_same_model_correct_what_is_predicted(tmp_path: Path) -> None:
    record = synthetic_record(STATIC, 64, peak=900 * MIB)
    chances = []
    for runs in ((), (Earlier(Path("a"), False, 100, (record,)),), (Earlier(Path("a"), True, 100, (record,)),)):
        search = search_in(tmp_path, MIXED, Fake(), earlier=runs, predicted=lambda c, context: 970 * MIB)
        chances.append(search._pairs.chance(STATIC, 64))
    assert chances[0] == pytest.approx(chances[1])
    assert chances[2] > chances[0] + 0.1


@pytest.mark.usefixtures("in_memory")
def test_contexts_far_from_all_of_this_run_are_left_out(tmp_path: Path) -> None:
    far = Earlier(Path("one"), True, 100, tuple(synthetic_record(BEST, context) for context in (16, 4096)))
    assert set(CONTEXTS) == {64, 256}
    cold, warm = (search_in(tmp_path, MIXED, Fake(), earlier=runs)._pairs for runs in ((), (far,)))
    assert warm.rate.mean[warm.pool.index[BEST, 64]] == cold.rate.mean[cold.pool.index[BEST, 64]]


@pytest.mark.usefixtures("in_memory")
def test_one_measurement_moves_all_that_an_earlier_run_on_a_slower_machine_said(tmp_path: Path) -> None:
    search = search_in(tmp_path, MIXED, Fake(), earlier=(earlier_of(KNOWN, times=0.5),))
    search.measured(KNOWN[1], 64)
    pairs = search._pairs
    pairs.learn()
    for configuration in KNOWN:
        expected = pairs.rate.mean[pairs.pool.index[configuration, 64]]
        assert expected == pytest.approx(math.log(rate(configuration, 64)), abs=0.12)
