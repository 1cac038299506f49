"""A whole run on the bundled pair as a user starts it: what it writes, that it continues, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jsonschema
import optuna
import pandas as pd
import pytest

from autotune import trial
from autotune.policy import read_policy, schema

SPACE = """
[weights]
choices = ["bf16"]
[draft]
choices = ["none", "prompt-lookup"]
[depth]
choices = [2]
[cache]
choices = ["dynamic", "static", "quantized-8"]
"""
# How steady this machine is now is not the question here; three rounds each, and finalists once again, will do.
CLI = """
from autotune import run, trial
trial.STABLE, trial.BUSY, trial._LOOK, trial._CARE, run.FINAL_ROUNDS = 100.0, 1.0, (1, 0.0), (2, 0.0), 1
from autotune.cli import main
main()
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", CLI, *words]


def run_command(folder: Path) -> list[str]:
    options = {"--contexts": "64,128", "--new-tokens": "4", "--trials": "3", "--timeout": "5m", "--budget": "2GB"}
    options |= {"--space": str(folder / "space.toml"), "--text": str(folder / "text.txt"), "--device": "cpu"}
    options |= {"--out": str(folder / "run"), "--max-quality-loss": "1000%"}
    return command("run", *(word for option in options.items() for word in option))


def environment() -> dict[str, str]:
    package = str(Path(trial.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": package, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}  # one: others may run beside


def prepare(folder: Path) -> Path:
    from autotune.demo import held_out_text

    (folder / "space.toml").write_text(SPACE)
    (folder / "text.txt").write_text(held_out_text()[:20_000], encoding="utf-8")
    return folder


def finish(words: list[str]) -> str:
    """What a command says that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def start(folder: Path, until: str) -> tuple[subprocess.Popen[str], str]:
    """A run that has just printed a line with the words, and what it printed so far."""
    process = subprocess.Popen(run_command(folder), stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if until in line:
            return process, said
    raise AssertionError(said)


def workers(folder: Path) -> list[int]:
    """The processes that write to the run's worker.log."""
    found = []
    for number in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            target = os.readlink(f"/proc/{number}/fd/2")
        except OSError:
            continue
        if target == str(folder / "run" / "worker.log"):
            found.append(int(number))
    return found


def rows(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "run" / "trials.csv", keep_default_na=False)


def measured(folder: Path) -> Counter[tuple[object, ...]]:
    """How often each (configuration, context) was measured, finalists measured again apart."""
    table = rows(folder)
    knobs = ["context_tokens", "weights", "lm_head", "draft", "depth", "cache", "attention", "prefill_chunk", "launch"]
    return Counter(map(tuple, table[table["stage"] != "final"][knobs].values.tolist()))


def stored(folder: Path) -> int:
    """Records in the storage of a run that is not running."""
    storage = optuna.storages.get_storage(f"sqlite:///{folder / 'run' / 'study.db'}")
    trials = [t for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id)]
    return sum("record" in t.user_attrs for t in trials)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[int]]:
    """A run that was killed while it measured: its folder, the records stored then, its workers then."""
    folder = prepare(tmp_path_factory.mktemp("killed"))
    process, _ = start(folder, "#3 ")
    for line in process.stdout or ():
        if "timing" in line:
            break
    running = workers(folder)
    process.kill()
    process.communicate()
    return folder, stored(folder), running


@pytest.fixture(scope="module")
def finished(killed: tuple[Path, int, list[int]]) -> tuple[Path, str]:
    """The same run, continued to its end with the same command: its folder and what it said."""
    return killed[0], finish(run_command(killed[0]))


def test_a_run_that_is_killed_leaves_no_worker_and_keeps_what_it_measured(killed: tuple[Path, int, list[int]]) -> None:
    folder, records, running = killed
    assert records == 2
    assert len(running) == 1
    for _ in range(100):
        if not workers(folder):
            break
        time.sleep(0.1)
    assert workers(folder) == []


def test_the_same_command_continues_a_killed_run_and_measures_nothing_twice(
    killed: tuple[Path, int, list[int]], finished: tuple[Path, str]
) -> None:
    folder, said = finished
    counts = measured(folder)
    assert set(counts.values()) == {1}
    assert sum(counts.values()) >= killed[1] + 3
    assert "trying weights" not in said
    assert "scoring the reference" not in said


def test_a_run_writes_a_policy_that_its_schema_and_its_reader_take(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    jsonschema.validate(json.loads((folder / "run" / "policy.json").read_text()), schema())
    policy = read_policy(folder / "run" / "policy.json")
    assert [rule.max_context_tokens for rule in policy.rules] == [64, 128]
    assert all(rule.expected.peak_bytes <= policy.budget_bytes == 2 * 10**9 for rule in policy.rules)
    assert policy.model.path.endswith("target")


def test_a_run_writes_every_file_of_the_contract(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert {"policy.json", "report.html", "trials.csv", "run.json", "study.db"} <= set(os.listdir(folder / "run"))
    info = json.loads((folder / "run" / "run.json").read_text())
    assert info["workload"]["contexts"] == [64, 128]
    assert info["environment"]["versions"]["torch"]
    assert len(info["text"]["text_sha256"]) == 64
    table = rows(folder)
    assert set(table["outcome"]) == {"ok"}
    assert (table["peak_bytes"].astype(float) <= 2e9).all()
    assert stored(folder) == len(table)
    assert "policy.json, report.html, trials.csv" in said


def test_the_run_ends_with_a_table_of_the_choice_per_context(finished: tuple[Path, str]) -> None:
    said = finished[1]
    assert "load: bf16 weights" in said
    for heading in ("up to", "settings", "tokens/s", "baseline", "quality loss"):
        assert heading in said
    assert "up to 64: " in said
    assert "up to 128: " in said


def test_report_and_export_rebuild_from_what_is_stored(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = finished[0] / "run"
    names = ("policy.json", "trials.csv", "report.html")
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / name).unlink()
    assert finish(command("report", str(run))) == f"{run}/report.html\n"
    assert {name: (run / name).read_bytes() for name in names} == before
    assert finish(command("export", str(run))).encode() == before["policy.json"]
    finish(command("export", str(run), "--format", "csv", "--to", str(tmp_path / "a.csv")))
    assert (tmp_path / "a.csv").read_bytes() == before["trials.csv"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"--contexts": "64,256"}, "another workload"),
        ({"--budget": "3GB"}, "another budget"),
        ({"--storage": "sqlite:///other.db"}, "another storage"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(
    finished: tuple[Path, str], changes: dict[str, str], word: str
) -> None:
    folder = finished[0]
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    words = run_command(folder) + [word for option in changes.items() for word in option]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 2
    assert f"holds a run with {word}" in done.stderr
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in (folder / "run").iterdir()} == before


def test_a_storage_of_another_workload_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    url = f"sqlite:///{finished[0] / 'run' / 'study.db'}"
    words = [*run_command(finished[0]), "--out", str(tmp_path / "run"), "--contexts", "64,256", "--storage", url]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 2
    assert "the storage already holds a run with another workload" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_the_best_so_far_and_after_a_text_that_was_too_short_nothing_is_in_the_way(
    tmp_path: Path,
) -> None:
    folder = prepare(tmp_path)
    (folder / "short.txt").write_text("def main():\n    pass\n")
    words = [*run_command(folder), "--text", str(folder / "short.txt")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=100, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "--text holds" in line and "longer file" in line]) == 1

    process, _ = start(folder, "#3 ")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped: finishing with what was measured" in said
    assert workers(folder) == []
    policy = read_policy(folder / "run" / "policy.json")
    assert [rule.max_context_tokens for rule in policy.rules] == [64, 128]
    assert len(rows(folder)) == stored(folder) == 2
