"""The parent's side with real processes that hang, die, lie and eat; the worker in them loads no model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.config import MIB, Budget, Configuration, Workload
from autotune.trial import process
from autotune.trial import trials as trial
from autotune.trial.inputs import Inputs
from autotune.trial.process import OurBug, WorkerFailed, WorkerProcess
from autotune.trial.trials import Trials
from autotune.trial.witness import Witness

FAULTY = Path(__file__).parents[1] / "faulty_worker.py"
BUDGET = Budget(500 * MIB)
BF16, NF4, INT8 = (Configuration(weights=word) for word in ("bf16", "bnb-nf4", "quanto-int8"))
Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes the next worker, or the present one, do something once."""
    monkeypatch.setattr(process, "WORKER", (sys.executable, str(FAULTY)))
    monkeypatch.setenv("FAULT", str(tmp_path / "fault.json"))
    monkeypatch.setenv("LIGHT", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(trial.__file__).parents[2]))
    return lambda do, at="measure", **more: (tmp_path / "fault.json").write_text(
        json.dumps({"do": do, "at": at, **more})
    )


@pytest.fixture
def trials(tmp_path: Path, plant: Plant) -> Iterator[Trials]:
    with Trials("model", Workload(contexts=(64,)), BUDGET, tmp_path) as trials:
        trials.inputs = Inputs("inputs.npz", {64: "reference.npy"})
        yield trials


def pid(trials: Trials) -> int:
    assert trials._worker is not None
    return trials._worker.process.pid


def is_gone(number: int) -> bool:
    """Ended, and soon: the kernel takes a moment, and an orphan stays a zombie where init does not reap."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_hangs_is_a_timeout_and_its_whole_process_group_is_gone(
    trials: Trials, plant: Plant, tmp_path: Path
) -> None:
    assert trials.measure(BF16, 64).outcome == "ok"
    worker = pid(trials)
    plant("hang", pid=str(tmp_path / "child"))
    record = trials.measure(BF16, 64, timeout_s=2)
    assert record.outcome == "timeout"
    assert "measure took longer than 2 s" in record.reason
    assert record.tokens_per_s is None
    assert is_gone(worker)
    assert is_gone(int((tmp_path / "child").read_text()))
    assert trials.measure(BF16, 64).outcome == "ok"
    assert pid(trials) != worker


def test_a_worker_that_is_killed_is_a_crash_that_names_the_signal_and_the_next_one_is_fresh(
    trials: Trials, plant: Plant
) -> None:
    trials.measure(BF16, 64)
    worker = pid(trials)
    plant("be killed")
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.reason) == ("crashed", "the worker was killed by SIGKILL")
    assert record.tokens_per_s is None
    assert trials.measure(BF16, 64).outcome == "ok"
    assert pid(trials) != worker
    assert trials.loads == 2


def test_a_worker_that_exits_is_a_crash_with_its_last_words(trials: Trials, plant: Plant) -> None:
    plant("exit")
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.reason) == ("crashed", "the worker exited with 3: the last words")


def test_a_worker_that_died_between_measurements_is_a_crash_and_is_replaced(trials: Trials) -> None:
    trials.measure(BF16, 64)
    os.kill(pid(trials), signal.SIGKILL)
    assert is_gone(pid(trials))
    assert trials.measure(BF16, 64).reason == "the worker was killed by SIGKILL"
    assert trials.measure(BF16, 64).outcome == "ok"


def test_what_a_library_prints_does_not_touch_a_result(trials: Trials, plant: Plant) -> None:
    plant("print")
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.tokens_per_s) == ("ok", 10.0)


@pytest.mark.parametrize("text", ["rubbish", "\xff\xfe", "42", "[]", "{}", '{"tokens_per_s": 9e9}'])
def test_rubbish_on_the_pipe_of_results_is_a_crash_that_shows_it(trials: Trials, plant: Plant, text: str) -> None:
    trials.measure(BF16, 64)
    worker = pid(trials)
    plant("write to the pipe", text=text)
    record = trials.measure(BF16, 64)
    assert record.outcome == "crashed"
    assert f"no event: {text.encode('latin-1')!r}" in record.reason
    assert record.tokens_per_s is None
    assert is_gone(worker)


def test_a_worker_is_kept_while_its_load_group_stays_and_replaced_when_it_changes(trials: Trials) -> None:
    trials.measure(BF16, 64)
    worker = pid(trials)
    trials.measure(BF16.replace(cache="static", prefill_chunk=32), 64)
    trials.measure(BF16.replace(draft="prompt-lookup", depth=4), 64)
    assert (pid(trials), trials.loads, trials.group) == (worker, 1, BF16.load_group)
    trials.measure(NF4, 64)
    assert is_gone(worker)
    assert (trials.loads, trials.group) == (2, NF4.load_group)


def test_a_load_that_failed_is_remembered_for_its_group_and_costs_no_other_group_its_worker(
    trials: Trials, plant: Plant
) -> None:
    plant("raise", at="load", text="can't allocate memory: 9 bytes")
    first = trials.measure(NF4, 64)
    assert (first.outcome, first.reason) == ("out_of_memory", "while loading: can't allocate memory: 9 bytes")
    trials.measure(BF16, 64)
    worker = pid(trials)
    again = trials.measure(NF4.replace(cache="static"), 64)
    assert (again.outcome, again.reason) == (first.outcome, first.reason)
    assert trials.measure(BF16, 64).outcome == "ok"
    assert (trials.loads, pid(trials)) == (2, worker)


def test_a_worker_that_dies_at_its_start_is_a_crash(trials: Trials, plant: Plant) -> None:
    plant("exit", at="start")
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.reason) == ("crashed", "while loading: the worker exited with 3: the last words")


def test_a_load_that_takes_too_long_is_a_timeout_and_is_tried_again(
    trials: Trials, plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LOAD_S", 2)
    plant("hang", at="load", pid=str(tmp_path / "child"))
    record = trials.measure(BF16, 64)
    assert record.outcome == "timeout"
    assert record.reason.startswith("while loading: ")
    assert is_gone(int((tmp_path / "child").read_text()))
    assert trials.measure(BF16, 64).outcome == "ok"


def test_an_error_from_a_library_is_a_crash_and_the_worker_is_replaced(trials: Trials, plant: Plant) -> None:
    trials.measure(BF16, 64)
    worker = pid(trials)
    plant("raise", text="Offset increment outside graph capture\nand more")
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.reason) == ("crashed", "RuntimeError: Offset increment outside graph capture")
    assert is_gone(worker)


def test_a_bug_of_our_own_stops_the_run_with_its_traceback(trials: Trials, plant: Plant) -> None:
    plant("have a bug")
    with pytest.raises(OurBug, match=r"(?s)Traceback.*config\.py.*in parse_bytes.*'no size' is not a memory size"):
        trials.measure(BF16, 64)


def test_nothing_outlives_the_trials_even_on_an_exception(plant: Plant, tmp_path: Path) -> None:
    plant("hang", pid=str(tmp_path / "child"))
    with pytest.raises(KeyboardInterrupt), Trials("model", Workload(), BUDGET, tmp_path) as trials:  # noqa: PT012
        trials.inputs = Inputs("inputs.npz", {64: "reference.npy"})
        trials.measure(BF16, 64, timeout_s=2)
        trials.measure(BF16, 64)
        worker = pid(trials)
        raise KeyboardInterrupt
    assert is_gone(worker)
    assert is_gone(int((tmp_path / "child").read_text()))


PARENT = """
import sys, time
from pathlib import Path
from autotune.trial import process
process.WORKER = (sys.executable, sys.argv[1])
worker = process.WorkerProcess(Path(sys.argv[2]), print).start("cpu", None)
print("worker", worker.process.pid, flush=True)
worker.request("measure", 600)
"""


def test_the_death_of_the_parent_takes_a_busy_worker_with_it(plant: Plant, tmp_path: Path) -> None:
    plant("hang", pid=str(tmp_path / "child"))
    command = [sys.executable, "-c", PARENT, str(FAULTY), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline().split()[1])
        while not (tmp_path / "child").exists():
            time.sleep(0.02)
        parent.kill()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # what the worker had started is not its parent's
    assert is_gone(worker)


@pytest.mark.parametrize(
    ("figures", "outcome", "reason"),
    [
        ({"peak_bytes": 500 * MIB}, "ok", ""),
        ({"peak_bytes": 501 * MIB}, "over_budget", "held 501 MiB at its peak, 1 MiB over the budget"),
        ({"peak_bytes": 501 * MIB, "wrong_output": "x", "perplexity_ratio": 2.0}, "over_budget", "held 501 MiB"),
        ({"wrong_output": "prompt 0 differs", "perplexity_ratio": 2.0}, "wrong_output", "prompt 0 differs"),
        ({"perplexity_ratio": 1.05}, "ok", ""),
        ({"perplexity_ratio": 1.0512}, "quality_loss", "perplexity is +5.1% of the reference's; the limit is +5.0%"),
        ({"perplexity_ratio": float("nan")}, "quality_loss", "nan"),
        ({"task_loss": 0.06, "task_loss_interval": (0.01, 0.11)}, "quality_loss", "are 6.0 points of F1 below"),
        ({"task_loss": 0.06, "task_loss_interval": (-0.01, 0.13)}, "ok", ""),  # within error
        ({"task_loss": 0.05, "task_loss_interval": (0.01, 0.09)}, "ok", ""),
        ({"spread": 0.51}, "unstable", "10.0 tokens/s, but rounds vary by 51%"),
        ({"spread": 0.5}, "ok", ""),
        ({"tokens_per_s_interval": None}, "ok", ""),
        ({"peak_reserved_bytes": 400 * MIB}, "over_budget", "were not on the device: they spilled to host memory"),
        ({"peak_reserved_bytes": 200 * MIB}, "ok", ""),
    ],
)
def test_a_measurement_is_judged_by_footprint_then_text_then_quality_then_steadiness(
    trials: Trials, plant: Plant, figures: dict[str, Any], outcome: str, reason: str
) -> None:
    plant("answer", figures=figures)
    record = trials.measure(BF16, 64)
    assert record.outcome == outcome
    assert reason in record.reason
    assert record.reason == "" or reason


@pytest.mark.alone
def test_the_witness_outside_sees_what_the_worker_does_not_say(trials: Trials, plant: Plant) -> None:
    assert trials.measure(BF16, 64).peak_bytes < 100 * MIB  # type: ignore[operator] # a measurement that ran has a peak
    plant("hold", bytes=600 * MIB)
    record = trials.measure(BF16, 64)
    assert (record.outcome, record.witness) == ("over_budget", "resident set")
    assert record.peak_bytes is not None
    assert record.peak_bytes > 600 * MIB
    assert trials.measure(BF16, 64).outcome == "ok"


def test_a_peak_is_forgotten_by_a_new_beginning_that_falls_into_a_sample() -> None:
    witness = Witness(os.getpid(), None)
    witness.peak = 600

    def read() -> int:
        witness.begin()
        witness.stop()
        return 5

    witness._read = read
    witness.run()
    assert witness.peak == 5


@pytest.mark.alone
def test_a_peak_while_loading_counts_for_every_measurement_of_the_group(trials: Trials, plant: Plant) -> None:
    plant("hold", at="load", bytes=600 * MIB)
    assert trials.measure(BF16, 64).outcome == "over_budget"
    assert trials.measure(BF16.replace(cache="static"), 64).outcome == "over_budget"
    assert trials.measure(NF4, 64).outcome == "ok"


def test_the_same_text_at_the_same_context_has_its_quality_measured_once(trials: Trials, plant: Plant) -> None:
    plant("answer", figures={"perplexity_ratio": 1.02, "kl_divergence": 0.5})
    first = trials.measure(BF16, 64)
    faster = trials.measure(BF16.replace(draft="prompt-lookup", depth=2), 64)
    assert (faster.perplexity_ratio, faster.kl_divergence) == (first.perplexity_ratio, 0.5)
    assert trials.measure(BF16.replace(cache="quantized-4"), 64).kl_divergence is None


def test_a_task_is_answered_once_for_the_same_text_at_whatever_context(
    trials: Trials, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trials.inputs is not None
    trials.inputs.references[128] = "other.npy"
    asked = []
    figures = {"task_exact_match": 0.5, "task_f1": 0.6, "task_loss": 0.3, "task_loss_interval": [0.1, 0.5]}
    trials.measure(BF16, 64)
    assert trials._worker is not None
    request = trials._worker.request

    def listen(op: str, timeout_s: float, **data: Any) -> dict[str, Any]:
        asked.append(data.get("task"))
        return request(op, timeout_s, **data)

    monkeypatch.setattr(trials._worker, "request", listen)
    trials.inputs = dataclasses.replace(trials.inputs, task="task.json")
    plant("answer", figures=figures)
    first = trials.measure(BF16, 64)
    faster = trials.measure(BF16.replace(draft="prompt-lookup", depth=2), 128)
    assert (first.outcome, faster.outcome) == ("quality_loss", "quality_loss")
    assert (faster.task_f1, faster.task_exact_match, faster.task_loss_interval) == (0.6, 0.5, (0.1, 0.5))
    assert trials.measure(BF16.replace(cache="quantized-4"), 64).task_f1 is None
    assert asked == [None, "task.json", None, None, None, "task.json"]  # begin, measure
    trials.learn(dataclasses.replace(first, configuration=NF4))
    assert trials.measure(NF4, 64).task_f1 == 0.6


def test_a_finalist_s_text_is_checked_for_every_prompt_until_it_was_right_once(
    trials: Trials, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.measure(BF16, 64)
    assert trials._worker is not None
    request, careful = trials._worker.request, []

    def listen(op: str, timeout_s: float, **data: Any) -> dict[str, Any]:
        careful.extend([data["careful"]] if op == "measure" else [])
        return request(op, timeout_s, **data)

    monkeypatch.setattr(trials._worker, "request", listen)
    plant("answer", figures={"wrong_output": "another text"})
    assert [trials.measure(BF16, 64, stage="final").outcome for _ in range(4)] == ["wrong_output", "ok", "ok", "ok"]
    trials.measure(BF16, 64)
    trials.measure(BF16.replace(cache="static"), 64, stage="final")
    assert careful == [True, True, False, False, False, True]


def test_a_request_to_a_worker_that_was_killed_says_so(plant: Plant, tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path / "log", lambda text: None).start("cpu", None)
    worker.process.kill()
    assert is_gone(worker.process.pid)
    with pytest.raises(WorkerFailed, match="killed by SIGKILL"):
        worker.request("measure", 5)
    worker.kill()
    worker.kill()
