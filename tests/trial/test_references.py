"""Reference logits of earlier runs: what is kept, what is found again, and what is scored again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autotune.trial import references
from autotune.trial.inputs import Inputs, reference_facts, score_reference

TOLD = {"how": "on the device", "took_s": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(number: int, folder: Path, size: int = 1000) -> str:
    """Keeps an array of that size, so many seconds after the first; returns its name."""
    (folder / "array").write_bytes(bytes([number]) * size)
    name = references.name({"number": number})
    references.keep(name, folder / "array", TOLD)
    if (path := references.folder() / name).exists():
        os.utime(path, (number, number))
    return name


def test_what_was_kept_comes_back_whole_with_what_was_told(tmp_path: Path, cache: Path) -> None:
    content = b"\x93NUMPY\nwith\n\nline breaks" + bytes(range(256))
    (tmp_path / "array").write_bytes(content)
    references.keep(references.name({"a": 1}), tmp_path / "array", TOLD)
    assert references.fetch(references.name({"a": 1}), tmp_path / "back") == TOLD
    assert (tmp_path / "back").read_bytes() == content
    assert references.fetch(references.name({"a": 2}), tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    assert os.listdir(cache) == [references.name({"a": 1})]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40], lambda b: b + b"x"])
def test_a_file_that_is_not_whole_is_none(tmp_path: Path, cache: Path, damage: Any) -> None:
    name = kept(1, tmp_path)
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(damage(whole))
    assert references.fetch(name, tmp_path / "back") is None
    for at in (3, 70, len(whole) // 2, len(whole) - 1):  # the digest, what was told, the array
        changed = bytearray(whole)
        changed[at] ^= 1
        (cache / name).write_bytes(changed)
        assert references.fetch(name, tmp_path / "back") is None
    assert not (tmp_path / "back").exists()


def test_the_files_that_were_used_least_recently_go_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LIMIT", 3500)  # three of them
    names = [kept(number, tmp_path) for number in (1, 2, 3)]
    assert references.fetch(names[0], tmp_path / "back") is not None  # used now, so it is the newest
    (cache / "mine.txt").write_text("x" * 9999)
    names.append(kept(4, tmp_path))
    assert set(os.listdir(cache)) == {"mine.txt", names[0], names[2], names[3]}
    names.append(kept(5, tmp_path, size=4000))  # larger than the limit: it displaces nothing
    assert set(os.listdir(cache)) == {"mine.txt", names[0], names[2], names[3]}


def test_a_folder_that_cannot_be_written_keeps_nothing_and_is_no_error(tmp_path: Path, cache: Path) -> None:
    cache.write_text("in the way")
    assert references.fetch(kept(1, tmp_path), tmp_path / "back") is None
    assert cache.read_text() == "in the way"


def test_the_folder_is_the_users_unless_another_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert references.folder() == cache
    monkeypatch.setenv("AUTOTUNE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert references.folder() == Path("/caches/autotune/references")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert references.folder() == Path("/home/me/.cache/autotune/references")


# In a run -------------------------------------------------------------------------------------------------------------

IDENTITY = {"model": {"weights_sha256": "m"}}
TEXT = {"tokens_sha256": "t", "windows": 4}
MACHINE = {"device": "d", "versions": {"torch": "1"}}


class Scorer:
    """A worker that only says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.phases: list[str] = []
        self.phase = self.phases.append

    def request(self, op: str, timeout_s: float, **data: Any) -> dict[str, Any]:
        self.asked.append((op, data["context"]) if "context" in data else op)
        if op == "reference":
            Path(data["path"]).write_text(f"logits at {data['context']}")
        return {"ln_ratio": 0.001} if op == "noise" else {"how": "layer by layer from host memory"}


def scored(folder: Path, contexts: tuple[int, ...], *, task: str | None = None, **changes: Any) -> tuple[Any, Any]:
    """What a worker was asked, and what came of it, in a run with the changed facts."""
    inputs = Inputs("inputs.npz", {context: str(folder / f"{context}.npy") for context in contexts}, task)
    for path in inputs.references.values():
        Path(path).unlink(missing_ok=True)
    facts = reference_facts(
        *({**had, **changes.get(key, {})} for key, had in zip("itm", (IDENTITY, TEXT, MACHINE), strict=True))
    )
    worker: Any = Scorer()
    found = score_reference(worker, folder, changes.get("weights", "bf16"), inputs, facts, changes.get("noise_at"))
    assert [Path(path).read_text() for path in inputs.references.values()] == [f"logits at {c}" for c in contexts]
    return worker.asked, found


def test_a_second_run_neither_loads_nor_scores_the_reference_and_says_the_same(tmp_path: Path) -> None:
    first = scored(tmp_path, (64, 128), noise_at=64)
    assert first[0] == ["load_reference", ("reference", 64), ("noise", 64), ("reference", 128)]
    assert first[1]["noise_floor"] == {"64": {"ln_ratio": 0.001}}
    assert first[1]["how"] == "layer by layer from host memory"
    again = scored(tmp_path, (64, 128), noise_at=64)
    assert again[0] == []
    assert {**again[1], "took_s": 0} == {**first[1], "took_s": 0}


def test_only_what_is_new_is_scored(tmp_path: Path, cache: Path) -> None:
    scored(tmp_path, (64, 128), noise_at=64)
    assert scored(tmp_path, (64, 96, 128), noise_at=64)[0] == ["load_reference", ("reference", 96)]
    assert scored(tmp_path, (128,))[0] == []
    wanted = scored(tmp_path, (128,), noise_at=128)  # its noise was not measured
    assert wanted[0] == ["load_reference", ("reference", 128), ("noise", 128)]
    assert scored(tmp_path, (128,), task="task.json")[0] == ["load_reference", "reference_task"]
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert scored(tmp_path, (64,))[0] == ["load_reference", ("reference", 64)]


@pytest.mark.parametrize(
    "changes",
    [
        {"i": {"model": {"weights_sha256": "other"}}},
        {"t": {"tokens_sha256": "other"}},
        {"t": {"windows": 2}},
        {"m": {"device": "other"}},
        {"m": {"versions": {"torch": "2"}}},
        {"weights": "fp32"},
    ],
)
def test_logits_of_anything_else_are_not_used(tmp_path: Path, changes: dict[str, Any]) -> None:
    scored(tmp_path, (64,))
    assert scored(tmp_path, (64,), **changes)[0] == ["load_reference", ("reference", 64)]
