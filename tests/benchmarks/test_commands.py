"""The parts of the benchmarks that decide: windows, bars, halves."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.config import Configuration, Record
from autotune.demo import TARGET
from autotune.model.calibration import DEFAULT, SPREAD
from autotune.model.shape import read_shape
from benchmarks import crosscheck, plan_error


@pytest.mark.parametrize(
    ("count", "window", "expected"),
    [
        (3, 4, [([9], [0, 1, 2])]),
        (4, 4, [([9], [0, 1, 2, 3])]),
        # a whole window looks back one token; the last one as far as the window reaches
        (10, 4, [([9], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]),
    ],
)
def test_rolling_windows_are_those_of_the_harness(count: int, window: int, expected: list[object]) -> None:
    assert list(crosscheck.rolling(list(range(count)), 9, window)) == expected


@pytest.mark.parametrize(("ours", "holds"), [(104.9, True), (95.1, True), (105.1, False), (94.9, False)])
def test_a_bar_is_missed_on_either_side(ours: float, holds: bool) -> None:
    assert crosscheck.row("x", ours, 100.0, 0.05)["holds"] is holds
    assert crosscheck.row("x", ours, 100.0, None)["holds"]


def test_a_peer_that_cannot_be_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(crosscheck.NotComparable, match=r"^lm-eval is not installed: ERROR: "):
        crosscheck.peer_python("lm-eval", tmp_path / "cache", tmp_path / "wheels")


def test_each_half_is_predicted_with_what_the_other_taught() -> None:
    shape = read_shape(TARGET)
    shapes, target = {str(TARGET): shape}, str(TARGET)
    pairs = []
    for number, context in enumerate((512, 512, 1024, 1024)):
        bare = Record(Configuration(), context, "ok", peak_bytes=1, base_bytes=400 * 2**20)
        said = plan_error.predict(shapes, target, bare, "cpu", DEFAULT["cpu"])
        off = 10 if number % 2 else 50  # MiB that the odd and the even records take beyond the prediction
        peak = said.total + (20 + off) * 2**20
        pairs.append((Record(Configuration(), context, "ok", peak_bytes=peak, base_bytes=400 * 2**20), said))
    after = plan_error.held_out(pairs, shapes, target, "cpu")
    for number, said in enumerate(after):  # the other record at this context, and the room for the next
        assert said == pytest.approx(pairs[number ^ 1][0].peak_bytes * (1 + SPREAD["cpu"]), rel=1e-6)
    assert plan_error.summarize([-0.04, 0.01, 0.03]) == {"p95": 0.04, "median": 0.03, "lowest": -0.04}


def test_the_errors_of_the_plan_are_measured_in_a_worker_and_can_be_judged_again(tmp_path: Path) -> None:
    options = ["--weights", "bf16", "--caches", "static", "--contexts", "64,128", "--timeout", "200"]
    done = CliRunner().invoke(plan_error.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["measured"] == 4
    assert {(row["context"], row["depth"]) for row in line["rows"]} == {(64, 0), (128, 0), (64, 4), (128, 4)}
    assert all(abs(row["before"]) < 0.25 for row in line["rows"])
    (tmp_path / "earlier.txt").write_text(done.stdout)
    again = CliRunner().invoke(plan_error.main, ["--replay", str(tmp_path / "earlier.txt")])
    assert json.loads(again.stdout.splitlines()[-1]) == line
    line["rows"][0]["measured"] *= 2
    (tmp_path / "doubled.txt").write_text(json.dumps(line))
    doubled = CliRunner().invoke(plan_error.main, ["--replay", str(tmp_path / "doubled.txt")])
    assert json.loads(doubled.stdout.splitlines()[-1])["before"]["lowest"] < -0.4
