from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.config import Budget, Configuration, Record, Workload
from autotune.results import RunError, frame, open_storage, read_records, read_run, storage_url
from autotune.search.study import Studies
from tests.records import synthetic_record

CONTRACT = ["context_tokens", "outcome", "reason"]
CONTRACT += ["weights", "lm_head", "embeddings", "draft", "draft_weights", "depth", "cache", "attention"]
CONTRACT += ["prefill_chunk", "launch", "tokens_per_s", "decode_tokens_per_s", "ttft_s", "acceptance", "peak_bytes"]
CONTRACT += ["peak_allocated_bytes", "peak_reserved_bytes", "perplexity_ratio", "kl_divergence", "top1_agreement"]
CONTRACT += ["load_s", "measure_s"]
INFO: dict[str, Any] = {
    "workload": {"contexts": [64, 256], "new_tokens": 32},
    "budget": {"bytes": 10**9, "device": "cpu"},
    "study": "run",
    "storage": None,
    "identity": {},
}


def run_in(folder: Path, records: list[Record], **info: Any) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(INFO | info))
    studies = Studies(storage_url(folder, INFO), "run", {}, (), seed=0)
    for record in records:
        studies.keep(record)
    return folder


RECORDS = [
    synthetic_record(Configuration(), 256, memory={"weights": 5, "kv_cache": 7}, acceptance=0.5),
    Record(Configuration(cache="static"), 64, "out_of_memory", "no memory,\nat all"),
]


def test_the_table_has_the_columns_of_the_contract_in_its_order() -> None:
    for records in (RECORDS, RECORDS[1:], []):
        columns = list(frame(records).columns)
        assert [name for name in columns if name in CONTRACT] == CONTRACT
        assert columns[:3] == CONTRACT[:3]


def test_a_table_of_nothing_has_the_columns_of_one_of_something() -> None:
    assert list(frame([]).columns) == list(frame(RECORDS[1:]).columns)
    assert len(frame([])) == 0


def test_the_table_has_a_row_per_record_with_its_figures() -> None:
    table = frame(RECORDS)
    assert len(table) == 2
    row = table.iloc[0]
    assert (row["context_tokens"], row["weights"], row["acceptance"]) == (256, "bf16", 0.5)
    assert (row["tokens_per_s_low"], row["tokens_per_s"], row["tokens_per_s_high"]) == (99, 100, 101)
    assert (row["memory_weights_bytes"], row["memory_kv_cache_bytes"]) == (5, 7)


def test_a_tasks_figures_have_columns_with_their_intervals() -> None:
    asked = synthetic_record(Configuration(), 256, task_f1=0.5, task_loss=0.25, task_loss_interval=[0.125, 0.375])
    row = frame([asked]).iloc[0]
    assert (row["task_f1"], row["task_loss"]) == (0.5, 0.25)
    assert (row["task_loss_low"], row["task_loss_high"]) == (0.125, 0.375)
    assert {"task_exact_match", "task_exact_match_low", "task_f1_high"} < set(frame(RECORDS).columns)


def test_a_failure_has_no_figures_in_the_table() -> None:
    row = frame(RECORDS).iloc[1]
    assert (row["outcome"], row["reason"], row["cache"]) == ("out_of_memory", "no memory,\nat all", "static")
    figures = ["tokens_per_s", "tokens_per_s_low", "ttft_s", "peak_bytes", "perplexity_ratio", "memory_weights_bytes"]
    assert row[figures].isna().all()


def test_the_table_survives_csv(tmp_path: Path) -> None:
    import pandas as pd

    frame(RECORDS).to_csv(tmp_path / "trials.csv", index=False)
    back = pd.read_csv(tmp_path / "trials.csv", keep_default_na=False, na_values=[""])
    assert list(back["reason"].fillna("")) == ["", "no memory,\nat all"]
    assert list(back["draft"]) == ["none", "none"]


def test_a_run_is_read_with_its_inputs_and_its_records(tmp_path: Path) -> None:
    run = read_run(run_in(tmp_path / "run", RECORDS))
    assert run.records == RECORDS
    assert run.workload == Workload(contexts=(64, 256), new_tokens=32)
    assert run.budget == Budget(10**9, "cpu")


def test_a_run_folder_that_was_moved_still_has_its_records(tmp_path: Path) -> None:
    run_in(tmp_path / "here", RECORDS).rename(tmp_path / "there")
    assert read_run(tmp_path / "there").records == RECORDS


def test_a_run_with_a_storage_elsewhere_is_read_from_there(tmp_path: Path) -> None:
    elsewhere = storage_url(run_in(tmp_path / "a", RECORDS), INFO)
    run_in(tmp_path / "b", [], storage=elsewhere)
    assert read_run(tmp_path / "b").records == RECORDS


def test_samples_and_intervals_survive_the_storage(tmp_path: Path) -> None:
    (record, _) = read_records(storage_url(run_in(tmp_path / "run", RECORDS), INFO), "run")
    assert record.samples == RECORDS[0].samples
    assert record.tokens_per_s_interval == (99.0, 101.0)


def test_a_folder_without_a_run_says_which_folder_to_give(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run\.json.*--out"):
        read_run(tmp_path)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[]", "no workload"), ('{"workload": {}}', "no budget")]
)
def test_a_run_json_that_is_none_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=rf"run\.json.*{said}"):
        read_run(tmp_path)


def test_a_run_without_its_storage_is_refused_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(INFO))
    with pytest.raises(RunError, match=r"no study\.db"):
        read_run(tmp_path)
    assert not (tmp_path / "study.db").exists()


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/study.db", "nosuchdb://host/name"])
def test_a_storage_that_cannot_be_opened_names_the_option(url: str) -> None:
    with pytest.raises(RunError, match=r"cannot be opened.*--storage") as caught:
        open_storage(url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
