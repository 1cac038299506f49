"""How far `autotune plan` is from the truth: predicted footprints beside measured ones.

Every combination of weights, cache, context and draft is predicted from config.json and measured in a capped worker as
a run measures it: a few new tokens, one round. The calibrated column is never a fit to the record that it is judged by:
records are split in two halves, alternately within each load group, each half is predicted with what `calibrate`
learned from the other, and so every record is held out once. A run learns from all records that it has, as it goes.

Errors are (predicted - measured) / measured: negative is an under-prediction, which lets through what does not fit. The
bars: 95 % of the absolute errors within 5 % on a CPU, 3 % on a GPU, and none below -1 %, after calibration.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from autotune.config import Budget, Configuration, Record, Workload, mib, parse_tokens
from autotune.model import calibration
from autotune.model.calibration import DEFAULT, Calibration, calibrate
from autotune.model.footprint import Prediction
from autotune.model.shape import ModelShape, read_shape
from benchmarks.prepare import HOPELESS, UNLIMITED, device_option, draft_option, model_option, pair_of, unscored

NEW_TOKENS = 8  # few, since a footprint hardly grows with them
DEPTH = 4  # tokens speculated per verification
WEIGHTS = "bf16,bnb-nf4,quanto-int8,quanto-int4,bnb-int8"
CACHES = "dynamic,static,quantized-8,quantized-4,quantized-fp8"
BARS = {"cpu": 0.05, "cuda": 0.03}  # share of the measured, within which 95 % of the errors have to lie: set by us
BELOW = 0.01  # share of the measured, the most that any prediction may lie below it: set by us

Pair = tuple[Record, Prediction]


def configurations(weights: list[str], caches: list[str], draft: Path | None, chunk: int) -> list[Configuration]:
    """By load group, so that each is loaded once."""
    drafts: list[dict[str, Any]] = [{}, {"draft": str(draft), "depth": DEPTH}] if draft else [{}]
    return [
        Configuration(weights=word, lm_head=_head(word), cache=cache, prefill_chunk=chunk, **drafted)
        for word, drafted, cache in itertools.product(weights, drafts, caches)
    ]


def _head(weights: str) -> str:
    return "fp32" if weights == "fp32" else "bf16"


def predict(
    shapes: dict[str, ModelShape], target: str, record: Record, device: str, learned: Calibration
) -> Prediction:
    c = record.configuration
    return calibration.predict(
        shapes[target], shapes.get(c.draft), c, record.context_tokens, NEW_TOKENS, device, learned
    )


def held_out(pairs: list[Pair], shapes: dict[str, ModelShape], target: str, device: str) -> list[int]:
    """Each record's footprint as predicted with what the other half taught."""
    said = [0] * len(pairs)
    for half in (0, 1):
        learned = calibrate([pair for i, pair in enumerate(pairs) if i % 2 != half], device)
        for i, (record, _) in enumerate(pairs):
            if i % 2 == half:
                said[i] = predict(shapes, target, record, device, learned).total
    return said


def summarize(errors: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    figures = {"p95": sizes[math.ceil(0.95 * len(sizes)) - 1], "median": sizes[len(sizes) // 2], "lowest": min(errors)}
    return {name: round(value, 5) for name, value in figures.items()}


def measure(
    model: Path, asked: list[Configuration], contexts: list[int], device: str, folder: Path, deadline: float
) -> Iterator[Record]:
    """Every configuration at every context, until the time is up."""
    workload = Workload(tuple(contexts), new_tokens=NEW_TOKENS)
    with unscored(model, workload, Budget(UNLIMITED, device), folder) as (trials, precision):
        for configuration, context in itertools.product(asked, contexts):
            c = configuration
            if c.weights == "bf16":
                c = c.replace(weights=precision, lm_head=precision)
                c = c.replace(draft_weights=precision) if c.has_draft_model else c
            if time.monotonic() > deadline:
                return
            yield trials.measure(c, context, bar=HOPELESS, timeout_s=max(30.0, deadline - time.monotonic()))


def replayed(rows: list[dict[str, Any]], draft: Path | None) -> Iterator[Record]:
    """The records of an earlier output; the draft model's folder is the one that is here."""
    for row in rows:
        c = Configuration(**{f.name: row[f.name] for f in dataclasses.fields(Configuration) if f.name in row})
        c = c.replace(draft=str(draft)) if draft and c.has_draft_model else c
        figures = {"peak_bytes": row["measured"], "base_bytes": row.get("base_bytes"), "memory": row["memory"]}
        yield Record(c, row["context"], "ok", **figures)


def _words(c: Configuration) -> str:
    return f"{c.weights:<12}{c.cache:<15}{'draft' if c.has_draft_model else '':<6}"


@click.command()
@model_option
@draft_option
@click.option("--weights", default=WEIGHTS, show_default=True)
@click.option("--caches", default=CACHES, show_default=True)
@click.option("--contexts", default="512,1k,2k,4k", show_default=True)
@click.option("--chunk", default=0, show_default=True, help="prefill chunk; 0 is the whole prompt")
@device_option
@click.option("--replay", type=click.Path(path_type=Path, exists=True), help="judge an earlier output's records again")
@click.option("--timeout", default=480, show_default=True, help="seconds; what was not measured by then is left out")
def main(
    model: Path | None,
    draft: Path | None,
    weights: str,
    caches: str,
    contexts: str,
    chunk: int,
    device: str,
    replay: Path | None,
    timeout: int,
) -> None:
    """Predicted beside measured footprints; the last line is one JSON object.

    With --replay nothing is measured: of --model and --draft only their config.json is read.

    Example: python -m benchmarks.plan_error --contexts 512,2k
    """
    deadline = time.monotonic() + timeout
    earlier = json.loads(replay.read_text().splitlines()[-1]) if replay else {}
    device = earlier.get("device", device)
    kind = device.partition(":")[0]
    model, draft = pair_of(model, draft)
    shapes = {str(folder): read_shape(folder) for folder in (model, draft) if folder}
    asked = configurations(weights.split(","), caches.split(","), draft, chunk)
    lengths = [parse_tokens(word) for word in contexts.split(",")]
    pairs: list[Pair] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(model, asked, lengths, device, Path(folder), deadline)
        for record in replayed(earlier["rows"], draft) if earlier else measured:
            words = f"{_words(record.configuration)}{record.context_tokens:>7}"
            if record.peak_bytes is None:
                left_out.append(f"{words}  {record.outcome}: {record.reason}")
            else:
                pairs.append((record, predict(shapes, str(model), record, device, DEFAULT[kind])))
            click.echo(f"{words}  {mib(record.peak_bytes or 0)}", err=True)
    if len(pairs) < 2:
        raise click.ClickException("\n".join(["nothing was measured", *left_out]))
    after = held_out(pairs, shapes, str(model), device)
    click.echo(f"{'weights':<12}{'cache':<15}{'':<6}{'context':>7}{'measured':>14}{'before':>9}{'after':>9}")
    rows = []
    for (record, before), said in zip(pairs, after, strict=True):
        truth = record.peak_bytes or 1
        errors = {"before": before.total / truth - 1, "after": said / truth - 1}
        rows.append({**dataclasses.asdict(record.configuration), "context": record.context_tokens, "measured": truth})
        rows[-1] |= {"base_bytes": record.base_bytes, "memory": record.memory, "owners": before.owners} | errors
        click.echo(
            f"{_words(record.configuration)}{record.context_tokens:>7}{mib(truth):>14}"
            f"{errors['before']:>+9.1%}{errors['after']:>+9.1%}"
        )
    for line in left_out:
        click.echo(f"{line} (left out)")
    missing = len(asked) * len(lengths) - len(pairs) - len(left_out)
    if missing and not earlier:
        click.echo(f"{missing} were not reached within --timeout {timeout}")
    both = {name: summarize([row[name] for row in rows]) for name in ("before", "after")}
    for name, figures in both.items():
        click.echo(f"{name} calibration: p95 {figures['p95']:.1%}, lowest {figures['lowest']:+.1%}")
    holds = both["after"]["p95"] <= BARS[kind] and both["after"]["lowest"] >= -BELOW
    click.echo(f"bars (after): p95 within {BARS[kind]:.0%}, none below -{BELOW:.0%}: {'held' if holds else 'MISSED'}")
    line = {"benchmark": "plan_error", "device": device, "measured": len(rows), "holds": holds, **both, "rows": rows}
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
