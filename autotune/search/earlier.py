"""What finished runs in the folders beside this one measured, for the search to begin with.

They are expectations and nothing else: of the rates, of the footprints and of what keeps its quality. A recommendation
rests on what this run measured itself. Whatever a folder holds is read as data of unknown origin: what does not belong
to this machine, this space and a model like this one is left out.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import OUTCOMES, Configuration, Record
from ..results import RunError, read_info
from .space import Space

# All chosen, not measured.
_FOLDERS = 50  # that are looked into, those changed last first
_RECORDS = 200  # that are used in all
_LARGEST = 2**25  # bytes of a trials.csv that is read
_LIKE = 1.5  # factor at most by which footprints of a model like this one are off, as predicted for this one
_TOKENS = 2**24  # of the longest context, and the most new ones, that are believed
_KNOBS = tuple(Configuration.__dataclass_fields__)
_FIGURES = ("tokens_per_s", "decode_tokens_per_s", "ttft_s", "spread", "peak_bytes", "base_bytes")


@dataclass(frozen=True)
class Earlier:
    """A finished run of this machine, as far as this one can learn from it."""

    folder: Path
    same: bool  # the same model; else one that needs about as much memory
    new_tokens: int
    records: tuple[Record, ...]


def earlier_runs(
    out: Path, info: Mapping[str, Any], space: Space, predicted: Callable[[Configuration, int], int]
) -> tuple[tuple[Earlier, ...], int]:
    """Runs to learn from in the folders beside `out`, those of the same model first; and how many folders are none.

    `info` is this run's, as in run.json; `predicted` the footprint that this run's plan expects, in bytes.
    """
    try:
        folders = [folder for folder in out.absolute().parent.iterdir() if (folder / "run.json").is_file()]
        folders.sort(key=lambda folder: ((folder / "run.json").stat().st_mtime, folder.name), reverse=True)
    except OSError:
        return (), 0
    others = [folder for folder in folders if folder.resolve() != out.resolve()][:_FOLDERS]
    found = [_read(folder, info, space, predicted) for folder in others]
    runs = sorted((run for run in found if run is not None), key=lambda run: not run.same)
    kept, left = [], _RECORDS
    for run in runs:
        if left > 0:
            kept.append(Earlier(run.folder, run.same, run.new_tokens, run.records[:left]))
            left -= len(run.records)
    return tuple(kept), len(others) - len(runs)


def learnt_from(runs: tuple[Earlier, ...], left_out: int) -> str:
    """One line for who watches; nothing where there was no other folder."""
    if not runs and not left_out:
        return ""
    parts = []
    for same, what in ((True, "this model"), (False, "a model of its size")):
        like = [run for run in runs if run.same == same]
        if like:
            names = ", ".join(run.folder.name for run in like)
            parts.append(f"{sum(len(run.records) for run in like)} measurements of {what} ({names})")
    text = f"earlier runs beside this one: {' and '.join(parts) or 'nothing to learn from'}"
    if left_out:
        text += f"; {left_out} left out, of another model or machine, or not readable"
    return f"{text}; --no-warm-start leaves out all" if parts else text


def _read(
    folder: Path, info: Mapping[str, Any], space: Space, predicted: Callable[[Configuration, int], int]
) -> Earlier | None:
    try:
        theirs = read_info(folder)
        for key in ("device", "full_precision"):
            if theirs["environment"][key] != info["environment"][key]:
                return None
        drafts = {draft["weights_sha256"]: name for draft, name in _drafts(info)}
        names = {name: drafts.get(draft["weights_sha256"]) for draft, name in _drafts(theirs)}
        same = theirs["identity"]["model"]["weights_sha256"] == info["identity"]["model"]["weights_sha256"]
        new_tokens = int(theirs["workload"]["new_tokens"])
        path = folder / "trials.csv"
        if path.stat().st_size > _LARGEST or not 0 < new_tokens <= _TOKENS:
            return None
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_record(row, names) for row in csv.DictReader(file)]
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return None
    records = {(r.configuration, r.context_tokens): r for r in rows if r is not None}
    kept = tuple(r for r in records.values() if space.parameters(r.configuration) is not None)
    off = [r.peak_bytes / predicted(r.configuration, r.context_tokens) for r in kept if r.peak_bytes]
    if not off or not 1 / _LIKE <= statistics.median(off) <= _LIKE:
        return None
    return Earlier(folder, same, new_tokens, kept)


def _drafts(info: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return list(zip(info["identity"]["drafts"], info["drafts"], strict=True))


def _record(row: Mapping[str, Any], drafts: Mapping[str, str | None]) -> Record | None:
    """A row of trials.csv; None for one with a draft that is not here. Raises ValueError, KeyError or TypeError."""
    words: dict[str, Any] = {knob: row[knob] for knob in _KNOBS}
    words |= {knob: int(words[knob]) for knob in ("depth", "prefill_chunk")}
    if words["draft"] not in ("none", "prompt-lookup"):
        words["draft"] = drafts.get(words["draft"])
        if words["draft"] is None:
            return None
    context, outcome = int(row["context_tokens"]), row["outcome"]
    figures = {name: _figure(row[name]) for name in _FIGURES}
    if outcome not in OUTCOMES or not 0 < context <= _TOKENS:
        raise ValueError(f"{outcome} at {context} tokens")
    for name in ("peak_bytes", "base_bytes"):
        figures[name] = None if figures[name] is None else int(figures[name])
    return Record(Configuration(**words), context, outcome, **figures)


def _figure(text: str) -> Any:
    """A positive number; None where none was measured."""
    if not text:
        return None
    value = float(text)
    if not 0 <= value < 1e15 or not math.isfinite(value):
        raise ValueError(text)
    return value or None
