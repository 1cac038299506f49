"""What every measurement of a run rests on: the text, cut into tokens, and the reference's logits over it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import Workload
from ..model.shape import read_shape
from . import references
from .process import WorkerProcess

# Both chosen, not measured.
_WINDOWS = {False: 4, True: 2}  # windows scored per context; fewer where a row of logits is large
_PARTS = 8  # into which what lies between two contexts is cut: three halvings find the part where a choice changes


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where a run's tokenized text and reference logits are. At a length without logits quality is not measured.

    `task` holds the questions with the reference's scores, where there is a task.
    """

    tokens: str
    references: dict[int, str]
    task: str | None = None


def score_reference(
    worker: WorkerProcess,
    model: Path,
    weights: str,
    inputs: Inputs,
    facts: dict[str, Any] | None = None,
    noise_at: int | None = None,
) -> dict[str, Any]:
    """Keep the unquantized model's logits where `inputs` has them; returns how it was loaded and what it took.

    With the `facts` that decide them, logits that an earlier run scored are taken from the cache. At the context
    `noise_at` the noise floor is measured as well, by context: it is taken for that of the others too.
    """
    began = time.monotonic()
    told: dict[int, dict[str, Any]] = {}
    names: dict[int, str] = {}
    if facts is not None:
        names = {at: references.name({**facts, "weights": weights, "context": at}) for at in inputs.references}
    for length, name in names.items():
        found = references.fetch(name, Path(inputs.references[length]))
        if found is not None and (length != noise_at or "noise" in found):
            worker.phase(f"the reference at {length} tokens was scored before")
            told[length] = found
    missing = [length for length in inputs.references if length not in told]
    if missing or inputs.task:
        how = worker.request("load_reference", 1800, model=str(model), weights=weights)["how"]
    for length in missing:
        where = {"inputs": inputs.tokens, "context": length}
        path = inputs.references[length]
        worker.request("reference", 1800, **where, path=path)
        told[length] = {"how": how, "took_s": round(time.monotonic() - began, 3)}
        if length == noise_at:
            told[length]["noise"] = worker.request("noise", 1800, **where, reference=path)
        if names:
            references.keep(names[length], Path(path), told[length])
    if inputs.task:
        worker.request("reference_task", 1800, path=inputs.task)
    longest = max(told.values(), key=lambda entry: float(entry["took_s"]))
    floor = {str(length): entry["noise"] for length, entry in told.items() if length == noise_at and entry["noise"]}
    took_s = max(longest["took_s"], round(time.monotonic() - began, 3))
    return {"how": longest["how"], "took_s": took_s, **({} if noise_at is None else {"noise_floor": floor})}


def reference_facts(identity: dict[str, Any], text: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """What decides the reference's logits, beside its weights and the context: the rest rounds otherwise elsewhere."""
    return {
        "model": identity["model"]["weights_sha256"],
        "text": [text["tokens_sha256"], text.get("windows")],
        "machine": [environment["device"], environment["versions"]],
    }


def input_files(folder: Path, workload: Workload) -> Inputs:
    """Where `prepare_inputs` writes."""
    references = {context: str(folder / f"reference-{context}.npy") for context in workload.contexts}
    return Inputs(str(folder / "inputs.npz"), references, str(folder / "task.json") if workload.task else None)


def prepare_inputs(
    worker: WorkerProcess,
    model: Path,
    workload: Workload,
    text: Path,
    folder: Path,
    environment: dict[str, Any],
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut the text and score it with the unquantized model, into files in `folder`: what every measurement rests on.

    With a run's `identity`, scores of earlier runs are used again and the noise floor is measured. Returns what was cut
    (`text`) and how it was scored (`reference`). Raises WorkerFailed.
    """
    shape, inputs = read_shape(model), input_files(folder, workload)
    cut = worker.request(
        "inputs",
        300,
        model=str(model),
        text=str(text),
        prompts=workload.prompts,
        contexts=measured_lengths(workload.contexts),
        windows=_WINDOWS[shape.vocab_size > 32768],
        path=inputs.tokens,
    )
    if inputs.task:
        room = min(workload.contexts) + workload.new_tokens
        cut |= worker.request("task", 300, model=str(model), task=workload.task, room=room, path=inputs.task)
    weights = "checkpoint" if shape.prequantized else environment["full_precision"]
    if identity is None:
        scored = score_reference(worker, model, weights, inputs)
    else:
        facts = reference_facts(identity, cut, environment)
        scored = score_reference(worker, model, weights, inputs, facts, noise_at=min(workload.contexts))
    return {"text": cut, "reference": {"weights": weights, **scored}}


def text_file(workload: Workload, folder: Path) -> Path:
    """The text that is measured on; the bundled one is written into `folder`."""
    if workload.text is not None:
        return Path(workload.text)
    from ..demo import held_out_text

    path = folder / "text.txt"
    path.write_text(held_out_text(), encoding="utf-8")
    return path


def lengths_between(low: int, high: int) -> list[int]:
    """The lengths that cut what lies between two contexts into equal parts; none where there is too little to cut."""
    return [low + (high - low) * part // _PARTS for part in range(1, _PARTS)] if high - low >= _PARTS else []


def measured_lengths(contexts: Iterable[int]) -> list[int]:
    """The contexts and every length between them at which a boundary may be looked for."""
    return sorted({*contexts, *(length for pair in pairwise(sorted(contexts)) for length in lengths_between(*pair))})
