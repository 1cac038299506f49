"""A whole run on the bundled pair as a user starts it: what it writes, that it continues, and how it ends.

Boundaries between contexts are looked for with a measurement that is a formula.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import optuna
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from autotune import run
from autotune.cli import main
from autotune.config import Budget, Configuration, Record, Workload
from autotune.demo import TARGET
from autotune.engine.support import full_precision
from autotune.model.shape import read_shape
from autotune.policy.policy import Policy, schema
from autotune.request import Request
from autotune.results import Run, frame, read_records, read_run
from autotune.search.finals import choice_by_search
from autotune.search.search import Search, coverage
from autotune.search.space import Space, read_space
from autotune.search.study import Studies
from autotune.trial import trials as trial
from autotune.trial.inputs import measured_lengths
from tests.records import Notes, synthetic_record

from .searches import HIGH, LOW, searching

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
import signal
from autotune.search import finals
from autotune.trial import trials
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
trials.STABLE, trials.BUSY, trials._LOOK, trials._CARE, finals.FINAL_ROUNDS = 100.0, 1.0, (1, 0.0), (2, 0.0), 1
from autotune.cli import main
main()
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", CLI, *words]


def run_words(folder: Path) -> list[str]:
    options = {"--contexts": "64,128", "--new-tokens": "4", "--trials": "3", "--timeout": "5m", "--budget": "2GB"}
    options |= {"--space": str(folder / "space.toml"), "--text": str(folder / "text.txt"), "--device": "cpu"}
    options |= {"--out": str(folder / "run"), "--max-quality-loss": "1000%"}
    return ["run", *(word for option in options.items() for word in option)]


def environment() -> dict[str, str]:
    package = str(Path(trial.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": package, "COLUMNS": "160"}


def prepare(folder: Path) -> Path:
    from autotune.demo import held_out_text

    (folder / "space.toml").write_text(SPACE)
    (folder / "text.txt").write_text(held_out_text()[:20_000], encoding="utf-8")
    return folder


def finish(*words: str) -> str:
    """What a command says that must succeed, in this process."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


def refuse(*words: str) -> str:
    """What a command complains of."""
    done = CliRunner().invoke(main, words)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    return done.stderr


def start(folder: Path, until: str) -> tuple[subprocess.Popen[str], str]:
    """A run that has just printed a line with the words, and what it printed so far."""
    process = subprocess.Popen(command(*run_words(folder)), stdout=subprocess.PIPE, text=True, env=environment())
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
    """How often each (configuration, context) was measured for the search."""
    table = rows(folder)
    knobs = ["context_tokens", "weights", "lm_head", "draft", "depth", "cache", "attention", "prefill_chunk", "launch"]
    return Counter(map(tuple, table[table["stage"].isin(["baseline", "search"])][knobs].values.tolist()))


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
    words = command(*run_words(killed[0]))
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return killed[0], done.stdout


def test_a_run_that_is_killed_leaves_no_worker_and_keeps_what_it_measured(killed: tuple[Path, int, list[int]]) -> None:
    folder, records, running = killed
    assert records == 2
    assert len(running) == 1
    for _ in range(100):
        if not workers(folder):
            break
        time.sleep(0.1)
    assert workers(folder) == []


def test_a_report_of_a_killed_run_has_a_policy_by_what_it_measured(killed: tuple[Path, int, list[int]]) -> None:
    run = killed[0] / "run"
    wrote = f"{run}/policy.json, report.html, trials.csv: the best so far of a run that has not ended\n"
    assert finish("report", str(run)) == wrote
    assert "not ended: the best so far" in (run / "report.html").read_text("utf-8")
    policy = Policy.load(run / "policy.json")
    assert [rule.max_context_tokens for rule in policy.rules] == [64, 128]
    assert [baseline.context_tokens for baseline in policy.baseline] == [64, 128]
    assert [policy.configuration(rule) for rule in policy.rules] == [r.configuration for r in read_run(run).records]


def test_the_same_command_continues_a_killed_run_and_measures_nothing_twice(
    killed: tuple[Path, int, list[int]], finished: tuple[Path, str]
) -> None:
    folder, said = finished
    counts = measured(folder)
    assert set(counts.values()) == {1}
    assert sum(counts.values()) >= killed[1] + 3
    assert "trying weights" not in said
    assert not [context for context in (64, 128) if f"scoring the reference at {context} tokens" in said]


def test_a_run_writes_a_policy_that_its_schema_and_its_reader_take(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    jsonschema.validate(json.loads((folder / "run" / "policy.json").read_text()), schema())
    policy = Policy.load(folder / "run" / "policy.json")
    assert {64, 128} <= {rule.max_context_tokens for rule in policy.rules}  # a boundary may lie between
    assert all(rule.expected.peak_bytes <= policy.budget_bytes == 2 * 10**9 for rule in policy.rules)
    assert policy.model.path.endswith("target")


def test_a_run_writes_every_file_of_the_contract(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert {"policy.json", "report.html", "trials.csv", "run.json", "study.db"} <= set(os.listdir(folder / "run"))
    info = json.loads((folder / "run" / "run.json").read_text())
    assert info["workload"]["contexts"] == [64, 128]
    assert info["environment"]["versions"]["torch"]
    assert len(info["text"]["text_sha256"]) == 64
    assert list(info["reference"]["noise_floor"]) == ["64"]
    assert 0 < info["reference"]["noise_floor"]["64"]["ln_ratio"] < 0.05
    assert Policy.load(folder / "run" / "policy.json").workload["noise_floor"] == info["reference"]["noise_floor"]
    table = rows(folder)
    assert set(table["outcome"]) == {"ok"}
    assert (table["peak_bytes"].astype(float) <= 2e9).all()
    assert stored(folder) == len(table)
    assert "policy.json, report.html, trials.csv" in said


def test_the_run_ends_with_a_table_of_the_choice_per_context(finished: tuple[Path, str]) -> None:
    said = finished[1]
    assert f"load: {full_precision('cpu')} weights" in said
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
    assert finish("report", str(run)) == f"{run}/policy.json, report.html, trials.csv\n"
    assert {name: (run / name).read_bytes() for name in names} == before
    assert b"the best so far" not in before["report.html"]
    assert finish("export", str(run)).encode() == before["policy.json"]
    finish("export", str(run), "--format", "csv", "--to", str(tmp_path / "a.csv"))
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
    said = refuse(*run_words(folder), *(word for option in changes.items() for word in option))
    assert f"holds a run with {word}" in said
    assert "--out" in said
    assert {path.name: path.read_bytes() for path in (folder / "run").iterdir()} == before


def test_a_storage_of_another_workload_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    url = f"sqlite:///{finished[0] / 'run' / 'study.db'}"
    said = refuse(*run_words(finished[0]), "--out", str(tmp_path / "run"), "--contexts", "64,256", "--storage", url)
    assert "the storage already holds a run with another workload" in said


def test_ctrl_c_or_sigterm_ends_with_the_best_so_far_and_after_a_text_that_was_too_short_nothing_is_in_the_way(
    tmp_path: Path,
) -> None:
    folder = prepare(tmp_path)
    (folder / "short.txt").write_text("def main():\n    pass\n")
    words = command(*run_words(folder), "--text", str(folder / "short.txt"))
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=100, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "--text holds" in line and "longer file" in line]) == 1

    for asked in (signal.SIGINT, signal.SIGTERM):
        process, _ = start(folder, "#3 ")
        process.send_signal(asked)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "stopped: finishing with what was measured" in said
        assert workers(folder) == []
        policy = Policy.load(folder / "run" / "policy.json")
        assert [rule.max_context_tokens for rule in policy.rules] == [64, 128]
        assert len(rows(folder)) == stored(folder) == 2


# Boundaries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reloads", [False, True])
def test_what_is_best_so_far_by_the_storage_is_what_the_search_itself_would_choose(
    tmp_path: Path, reloads: bool
) -> None:
    large, small = Configuration(), Configuration(weights="bnb-nf4")
    fast, lucky = Configuration(weights="quanto-int4"), Configuration(weights="quanto-int4", cache="static")
    rates = {(fast, LOW): 100.0, (fast, HIGH): 50.0, (lucky, LOW): 130.0, (lucky, HIGH): 51.0}
    looks: Counter[Configuration] = Counter()

    def measure(configuration: Configuration, context: int, stage: str) -> Record:
        looks[configuration] += 1
        if (configuration, context) == (large, HIGH):
            return Record(configuration, context, "over_budget", "too large", stage=stage)
        rate = rates.get((configuration, context), 20.0)
        if looks[lucky] > 2:  # its second look is below what else is fastest, both together are not
            rate *= 0.7
        return synthetic_record(configuration, context, (rate, 1.01 * rate, 0.99 * rate), stage=stage)

    search = searching(tmp_path, measure)
    info = {"reloads": reloads, "workload": dataclasses.asdict(search.workload)}

    def so_far() -> tuple[dict[int, Configuration], dict[int, Configuration]]:
        return run._so_far(Run(tmp_path, info, read_records(f"sqlite:///{tmp_path / 'study.db'}", "run")))

    assert so_far() == ({}, {})
    search.baseline([large, small])
    for configuration in (fast, lucky):
        for context in (LOW, HIGH):
            search.measured(configuration, context)
    search.measured(lucky, LOW, again=True)
    search.studies.keep(synthetic_record(small, LOW, (900.0, 900.0, 900.0), stage="final"))  # a final is no look
    chosen, baselines = so_far()
    assert (chosen, baselines) == choice_by_search(search, [large, small], reloads)
    assert baselines == {LOW: large, HIGH: small}
    assert chosen[LOW] == lucky


@given(st.sets(st.integers(1, 10**5), min_size=1, max_size=5))
def test_inputs_are_cut_for_every_length_that_a_boundary_may_have(contexts: set[int]) -> None:
    lengths = measured_lengths(contexts)
    assert lengths == sorted(set(lengths))
    assert set(contexts) <= set(lengths)
    assert (min(lengths), max(lengths)) == (min(contexts), max(contexts))
    assert len(lengths) <= 8 * len(contexts) - 7


def test_a_measurement_that_the_end_of_a_run_cut_short_is_not_known_to_the_next(tmp_path: Path) -> None:
    workload, cut, slow, done = Workload(contexts=(64,)), *(Configuration(prefill_chunk=chunk) for chunk in (1, 2, 3))
    request = Request(
        TARGET, Budget(10**9), workload=workload, space=read_space("quick"), space_name="quick", out=tmp_path
    )
    studies = Studies(run._url(request), request.study, {}, workload.contexts, 0)
    studies.keep(Record(cut, 64, "timeout", "measure took longer than 30 s"))
    studies.keep(Record(slow, 64, "timeout", "measure took longer than 600 s"))
    studies.keep(synthetic_record(done, 64))
    shapes, info = {str(TARGET): read_shape(TARGET)}, {"environment": {"base_bytes": 10**8}}
    search = run._search(request, request.space, shapes, studies, Mock(), info, Notes())
    assert set(search.known) == {(slow, 64), (done, 64)}


@pytest.mark.parametrize("warm_start", [True, False])
def test_an_earlier_run_calibrates_the_plan_unless_it_shall_not(tmp_path: Path, warm_start: bool) -> None:
    workload = Workload(contexts=(64,))
    request = Request(
        TARGET, Budget(10**9), workload=workload, space=read_space("quick"), space_name="quick", out=tmp_path / "run"
    )
    request.warm_start = warm_start
    request.out.mkdir()
    (earlier := tmp_path / "earlier").mkdir()
    info: dict[str, Any] = {"environment": {"base_bytes": 10**8, "device": "a CPU", "full_precision": "bf16"}}
    info |= {"identity": {"model": {"weights_sha256": "m"}, "drafts": []}, "drafts": []}
    asked = {"workload": {"new_tokens": 8}, "budget": {}, "study": "", "storage": None}
    (earlier / "run.json").write_text(json.dumps(info | asked))
    shapes, notes = {str(TARGET): read_shape(TARGET)}, Mock()
    studies = Studies(run._url(request), request.study, {}, workload.contexts, 0)
    prepared = run.Foresight(str(request.model), shapes, request.budget, request.workload.new_tokens, 10**8)
    sizes = [
        synthetic_record(c, 64, peak=round(1.2 * prepared.predicted(c, 64)), base_bytes=10**8)
        for c in list(request.space.configurations())[:4]
    ]
    frame(sizes).to_csv(earlier / "trials.csv", index=False)
    search = run._search(request, request.space, shapes, studies, Mock(), info, notes)
    assert [call.args[0] for call in notes.note.call_args_list if "earlier" in call.args[0]] == (
        ["earlier runs beside this one: 4 measurements of this model (earlier); --no-warm-start leaves out all"]
    ) * warm_start
    assert (len(search.earlier), search.known) == (warm_start, {})
    largest = max(record.peak_bytes or 0 for record in sizes)
    search.fits.__self__.budget = Budget(round(0.95 * largest))  # type: ignore[attr-defined]
    assert bool(search.fits(sizes[-1].configuration, 64)) == warm_start


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_on_a_gpu_the_search_knows_what_a_step_reads(tmp_path: Path, device: str) -> None:
    workload = Workload(contexts=(64,))
    request = Request(
        TARGET, Budget(10**9, device), workload=workload, space=read_space("quick"), space_name="quick", out=tmp_path
    )
    studies = Studies(run._url(request), request.study, {}, workload.contexts, 0)
    info: dict[str, Any] = {"environment": {"base_bytes": 10**8}, "identity": {"model": {}, "drafts": []}}
    request.warm_start = False
    search = run._search(request, request.space, {str(TARGET): read_shape(TARGET)}, studies, Mock(), info, Mock())
    assert (search.step_bytes is None) == (device == "cpu")
    if search.step_bytes is not None:
        full, packed = (search.step_bytes(Configuration(weights=w), 64) for w in ("bf16", "bnb-nf4"))
        assert packed < 0.5 * full
        assert search.step_bytes(Configuration(), 4096) > full


@pytest.mark.parametrize(("share", "text"), [(0.0416, "; stopped with about 4% of the gain open"), (None, "")])
def test_a_run_keeps_what_share_of_the_gain_it_left_open(tmp_path: Path, share: float | None, text: str) -> None:
    request, info = Mock(out=tmp_path), {"seed": 0}
    assert run._ended(request, info, Mock(open=share)) == text
    kept = json.loads((tmp_path / "run.json").read_text()) if share else {"seed": 0}
    assert kept == info == {"seed": 0} | ({"open_gain": share} if share else {})


def test_the_run_says_how_much_of_the_space_it_measured_and_what_was_ruled_out(tmp_path: Path) -> None:
    space = Space({"cache": ("static", "dynamic"), "prefill_chunk": (0, 32)})
    studies = Studies(f"sqlite:///{tmp_path}/study.db", "study", {}, (64, 128), 0)

    def fits(configuration: Configuration, context: int) -> str:
        return "predicted over the budget" if configuration.cache == "static" and context == 128 else ""

    search = Search(
        space=space,
        workload=Workload(contexts=(64, 128)),
        budget=Budget(10**9),
        studies=studies,
        measure=Mock(),
        fits=fits,
        deadline=0.0,
    )
    record = synthetic_record(Configuration(cache="dynamic"), 64)
    search.known[record.configuration, 64] = record
    measured = "measured 1 of 8 (configuration, context) pairs of the space"
    assert coverage(search) == f"{measured}; 2 more cannot fit or cannot differ"
