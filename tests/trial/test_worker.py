"""The real worker under a real cap, on the bundled draft; faults are planted inside the measured generation."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, call

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config

from autotune.config import MIB, Budget, Configuration, Record, Workload
from autotune.demo import DRAFT, held_out_text
from autotune.trial import process
from autotune.trial import trials as trial
from autotune.trial.inputs import Inputs
from autotune.trial.process import OurBug, WorkerFailed, WorkerProcess
from autotune.trial.trials import Trials
from autotune.trial.worker import Worker

FAULTY = Path(__file__).parents[1] / "faulty_worker.py"
CONTEXTS = (64, 3072)
ROOM = 150 * MIB  # what the budget leaves beside the libraries

Plant = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[WorkerProcess]:
    """The real worker without a cap."""
    worker = WorkerProcess(folder / "worker.log", lambda text: None).start("cpu", None)
    yield worker
    worker.kill()


@pytest.fixture(scope="module")
def trials(folder: Path, plain: WorkerProcess) -> Iterator[Trials]:
    """Trials whose workers can have faults, under a budget that binds."""
    (folder / "text.txt").write_text(held_out_text()[:40_000], encoding="utf-8")
    inputs = Inputs(str(folder / "inputs.npz"), {context: str(folder / f"{context}.npy") for context in CONTEXTS})
    request = {"model": str(DRAFT), "text": str(folder / "text.txt"), "prompts": None, "contexts": list(CONTEXTS)}
    plain.request("inputs", 120, **request, windows=1, path=inputs.tokens)
    plain.request("load_reference", 120, model=str(DRAFT), weights="bf16")
    for context, path in inputs.references.items():
        plain.request("reference", 120, inputs=inputs.tokens, context=context, path=path)
    workload = Workload(contexts=CONTEXTS, new_tokens=4)
    budget = Budget(plain.hello["base_bytes"] + ROOM)
    with pytest.MonkeyPatch.context() as patch, Trials(str(DRAFT), workload, budget, folder) as trials:
        patch.setattr(process, "WORKER", (sys.executable, str(FAULTY)))
        patch.setattr(trial, "STABLE", 100.0)  # how steady this machine is now is not the question
        patch.setattr(trial, "BUSY", 1.0)
        patch.setattr(trial, "_LOOK", (3, 0.0))  # three rounds will do, and show no drift
        patch.setattr(trial, "_CARE", (3, 0.0))
        patch.setenv("PYTHONPATH", str(Path(trial.__file__).parents[2]))
        patch.setenv("FAULT", str(folder / "fault.json"))
        trials.inputs = inputs
        yield trials


@pytest.fixture
def plant(trials: Trials, folder: Path) -> Plant:
    return lambda do, **more: (folder / "fault.json").write_text(json.dumps({"do": do, "at": "generate", **more}))


def pid(trials: Trials) -> int:
    assert trials._worker is not None
    return trials._worker.process.pid


def is_feasible(record: Record, trials: Trials) -> bool:
    assert record.outcome == "ok", record.reason
    return record.peak_bytes is not None and record.peak_bytes <= trials.budget.bytes


STOCK = Configuration(weights="bf16")
EAGER = STOCK.replace(attention="eager")
# A worker takes seconds to start, so tests of one load group stand together, and what spoils the worker comes last.


def test_a_record_holds_every_figure_of_a_real_measurement(trials: Trials) -> None:
    record = trials.measure(STOCK, 64)
    assert is_feasible(record, trials)
    assert record.perplexity_ratio == 1.0
    assert record.kl_divergence == 0.0
    assert record.top1_agreement == 1.0
    assert {sample["new_tokens"] for sample in record.samples} == {4}
    assert record.base_bytes is not None
    assert record.peak_bytes is not None
    assert sum(record.memory.values()) >= record.peak_bytes * 0.9
    assert record.memory["weights"] > MIB // 2


def test_the_noise_floor_is_what_the_reference_loses_against_itself_and_leaves_it_as_it_was(
    trials: Trials, plain: WorkerProcess, folder: Path
) -> None:
    assert trials.inputs is not None
    again = {"inputs": trials.inputs.tokens, "context": 64}
    floor = plain.request("noise", 60, reference=trials.inputs.references[64], **again)
    assert 0 < floor["ln_ratio"] < 0.05
    assert 0 < floor["kl_divergence"] < 0.01
    assert plain.request("noise", 60, reference=trials.inputs.references[64], **again) == floor
    plain.request("reference", 60, path=str(folder / "again.npy"), **again)
    assert (folder / "again.npy").read_bytes() == Path(trials.inputs.references[64]).read_bytes()


def test_a_worker_that_eats_memory_is_stopped_by_its_cap_and_is_usable_afterwards(trials: Trials, plant: Plant) -> None:
    trials.measure(STOCK, 64)
    worker = pid(trials)
    plant("eat", bytes=2 * ROOM)
    record = trials.measure(STOCK, 64)
    assert record.outcome == "out_of_memory"
    assert record.tokens_per_s is None
    assert is_feasible(trials.measure(STOCK, 64), trials)
    assert pid(trials) == worker


def test_a_spike_of_20_ms_that_no_limit_sees_is_over_budget(trials: Trials, plant: Plant) -> None:
    plant("spike", bytes=2 * ROOM)
    record = trials.measure(STOCK, 64)
    assert record.outcome == "over_budget"
    assert record.peak_bytes is not None
    assert record.peak_bytes > trials.budget.bytes
    assert is_feasible(trials.measure(STOCK, 64), trials)


def test_a_spike_reaches_the_record_even_when_the_witness_outside_slept(
    trials: Trials, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.measure(STOCK, 64)
    assert trials._worker is not None
    assert trials._worker.witness is not None
    monkeypatch.setattr(trials._worker.witness, "_read", lambda: 0)
    plant("spike", bytes=2 * ROOM)
    assert trials.measure(STOCK, 64).outcome == "over_budget"


def test_what_a_larger_measurement_left_is_not_counted_as_the_next_ones(trials: Trials, plant: Plant) -> None:
    before = trials.measure(STOCK, 64).peak_bytes
    plant("leave behind", bytes=ROOM // 2)
    trials.measure(STOCK, 64)
    after = trials.measure(STOCK, 64).peak_bytes
    assert before is not None
    assert after is not None
    assert after < before + ROOM // 4


@pytest.mark.parametrize(
    ("word", "reason"), [("sliding", "no sliding-window layers"), ("offloaded", "there is no GPU here")]
)
def test_what_cannot_run_comes_back_with_its_reason_and_leaves_the_worker_usable(
    trials: Trials, word: str, reason: str
) -> None:
    trials.measure(STOCK, 64)
    worker = pid(trials)
    record = trials.measure(STOCK.replace(cache=word), 64)
    assert record.outcome == "unsupported"
    assert reason in record.reason
    assert trials.measure(STOCK, 64).outcome == "ok"
    assert pid(trials) == worker


def test_a_prompt_that_needs_more_than_the_budget_is_out_of_memory_and_the_same_worker_goes_on(trials: Trials) -> None:
    whole = trials.measure(EAGER, 3072)
    assert whole.outcome == "out_of_memory"
    assert "no room for" in whole.reason
    assert whole.peak_bytes is None
    assert whole.tokens_per_s is None
    worker = pid(trials)
    assert is_feasible(trials.measure(EAGER, 64), trials)
    assert pid(trials) == worker


def test_a_cache_that_loses_its_last_tokens_is_a_quality_loss(trials: Trials, plant: Plant) -> None:
    assert trials.measure(EAGER, 64).outcome == "ok"
    plant("lose the last 8 tokens")
    record = trials.measure(EAGER.replace(cache="static"), 64)  # another cache: its quality is not known yet
    trials.close()
    assert record.outcome == "quality_loss"


def test_recorded_steps_of_the_last_measurement_are_gone_before_peaks_begin() -> None:
    worker = Mock()
    Worker.begin(worker)
    assert worker.mock_calls == [call.engine.close(), call.meter.begin()]
    Worker.begin(Mock(engine=None))  # nothing was loaded


def test_memory_beside_the_allocator_that_stays_is_over_budget(trials: Trials, plant: Plant) -> None:
    trials.close()
    plant("keep", bytes=2 * ROOM)
    record = trials.measure(STOCK, 64)
    trials.close()
    assert record.outcome == "over_budget"
    assert "over the budget" in record.reason


def test_a_cache_that_keeps_rejected_tokens_is_wrong_output(trials: Trials, plant: Plant) -> None:
    speculative = Configuration(weights="fp32", lm_head="fp32", draft="prompt-lookup", depth=4)
    with longer(trials, 48):
        sound = trials.measure(speculative, 64, stage="final")
        plant("keep rejected tokens")
        record = trials.measure(speculative, 64, stage="final")
        trials.close()
    assert sound.outcome == "ok", sound.reason
    assert record.outcome == "wrong_output"
    assert "differs from plain decoding at new token" in record.reason


@pytest.mark.alone
def test_a_clock_that_drops_halfway_is_unstable_and_named(
    trials: Trials, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_LOOK", (6, 0.0))
    trials.close()
    with longer(trials, 12):
        plant("lower the clock", after=7, share=0, step_s=0.1)
        record = trials.measure(STOCK, 64)
        trials.close()
    assert record.outcome == "unstable"
    assert "was the clock lowered?" in record.reason


@contextlib.contextmanager
def longer(trials: Trials, new_tokens: int) -> Iterator[None]:
    """More new tokens than other tests need."""
    workload = trials.workload
    trials.workload = dataclasses.replace(workload, new_tokens=new_tokens)
    yield
    trials.workload = workload


def test_a_load_that_cannot_run_comes_back_with_its_reason(trials: Trials) -> None:
    record = trials.measure(Configuration(weights="checkpoint"), 64)
    assert record.outcome == "unsupported"
    assert record.reason == (
        "while loading: weights = checkpoint is for checkpoints that are already quantized; this one is not"
    )


def test_a_budget_below_the_libraries_own_footprint_is_out_of_memory_at_once(trials: Trials, folder: Path) -> None:
    with Trials(str(DRAFT), trials.workload, Budget(50 * MIB), folder) as small:
        small.inputs = trials.inputs
        record = small.measure(STOCK, 64)
    assert record.outcome == "out_of_memory"
    assert "before any weight; the budget is 50 MiB" in record.reason


def test_the_probe_names_what_this_machine_cannot_run_with_the_reason(plain: WorkerProcess) -> None:
    failed = plain.request("probe", 120, words={"weights": ["bf16", "fp32"], "attention": ["sdpa", "eager"]})
    assert failed == {"event": "done"} or set(failed) - {"event"} <= {"weights"}
    failed = plain.request("probe", 120, words={"attention": ["sdpa", "flash_attention_3"]})
    assert list(failed["attention"]) == ["flash_attention_3"]
    assert failed["attention"]["flash_attention_3"]


def test_the_probe_names_what_the_model_lacks_and_the_reference_does_without(
    plain: WorkerProcess, tmp_path: Path
) -> None:
    config = Gemma2Config(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    failed = plain.request("probe", 120, words={"attention": ["eager", "sdpa"]}, model=str(tmp_path))
    assert failed["attention"] == {"sdpa": "transformers' gemma2 has no sdpa"}
    assert plain.request("load_reference", 120, model=str(tmp_path), weights="fp32")["how"] == "on the device"


def test_a_text_that_is_too_short_names_the_flag_and_leaves_the_worker_usable(
    plain: WorkerProcess, folder: Path
) -> None:
    (folder / "short.txt").write_text("def main():\n    pass\n")
    request = {"model": str(DRAFT), "prompts": None, "windows": 1, "path": str(folder / "short.npz")}
    with pytest.raises(
        WorkerFailed, match=r"^--text holds \d+ tokens and 192 are needed: give a longer file"
    ) as failure:
        plain.request("inputs", 60, text=str(folder / "short.txt"), contexts=[64], **request)
    assert not failure.value.poisoned
    (folder / "prompts.jsonl").write_text('{"prompt": "def main():"}\n')
    request |= {"prompts": str(folder / "prompts.jsonl"), "text": str(folder / "text.txt")}
    with pytest.raises(WorkerFailed, match=r"^--prompts holds \d+ tokens and 64 are needed"):
        plain.request("inputs", 60, contexts=[64], **request)
    assert plain.request("environment", 60)["full_precision"] in ("bf16", "fp32")


def test_a_request_that_our_own_code_gets_wrong_is_our_bug(plain: WorkerProcess) -> None:
    with pytest.raises(OurBug, match=r"(?s)Traceback.*worker\.py.*missing 1 required positional argument"):
        plain.request("load", 10, model=str(DRAFT))
