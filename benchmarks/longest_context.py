"""The longest prompt that really runs inside a budget, with and without a draft model, found by measuring.

A prompt of the length is prefilled and a few tokens are decoded in a capped worker, as a trial of a run is, and the
witness outside must have seen no more than the budget. Lengths are bisected in steps; what `autotune plan` said stands
beside what was found.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from autotune.config import Budget, Configuration, Record, Workload, mib, parse_bytes, parse_tokens
from autotune.model.calibration import DEFAULT, largest_context
from autotune.model.shape import read_shape
from benchmarks.prepare import HOPELESS, device_option, draft_option, model_option, pair_of, unscored

NEW_TOKENS = 32  # chosen: decoding has to fit as well


def longest(lengths: list[int], measure: Callable[[int], Record]) -> tuple[Record | None, Record | None]:
    """The records of the longest that fits and of the next one, which does not; None where there is none."""
    fits, fails = -1, len(lengths)
    found: dict[int, Record] = {}
    while fails - fits > 1:
        middle = (fits + fails) // 2
        found[middle] = measure(lengths[middle])
        if found[middle].outcome in ("ok", "unstable"):
            fits = middle
        else:
            fails = middle
    return found.get(fits), found.get(fails)


@click.command(epilog="\b\nExample:\n  python -m benchmarks.longest_context --budget 500MB --step 256")
@model_option
@draft_option
@click.option("--budget", default="500MB", show_default=True)
@click.option("--most", default="4k", show_default=True, help="the longest length that is tried")
@click.option("--step", default="256", show_default=True, help="tokens between two lengths")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="UTF-8 text; else the bundled pair's")
@click.option("--configuration", default="{}", help="JSON object of knobs")
@click.option("--depth", default=4, show_default=True, help="of the draft")
@device_option
def main(
    model: Path | None,
    draft: Path | None,
    budget: str,
    most: str,
    step: str,
    text: Path | None,
    configuration: str,
    depth: int,
    device: str,
) -> None:
    """Bisect for the longest prompt; the last line is one JSON object."""
    model, draft = pair_of(model, draft)
    lengths = list(range(parse_tokens(step), parse_tokens(most) + 1, parse_tokens(step)))
    limit = Budget(parse_bytes(budget), device)
    plain = Configuration(**json.loads(configuration))
    asked = [plain]
    if draft is not None:
        asked.insert(0, plain.replace(draft=str(draft), draft_weights=plain.weights, depth=depth))
    shapes = {str(folder): read_shape(folder) for folder in (model, draft) if folder}
    workload = Workload(tuple(lengths), new_tokens=NEW_TOKENS, text=str(text) if text else None)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, unscored(model, workload, limit, Path(scratch)) as (trials, _):

        def measure(length: int) -> Record:
            record = trials.measure(chosen, length, bar=HOPELESS, timeout_s=300)
            held = f"{mib(record.peak_bytes)}, {record.witness}" if record.peak_bytes else record.reason
            owners = {owner: mib(size) for owner, size in record.memory.items()}
            click.echo(f"{length:>7} {record.outcome:<14} {held} {owners or ''}", err=True)
            return record

        for chosen in asked:
            fits, fails = longest(lengths, measure)
            said = largest_context(
                shapes[str(model)],
                shapes.get(chosen.draft),
                chosen,
                NEW_TOKENS,
                limit,
                DEFAULT[device.partition(":")[0]],
            )
            name = "with the draft" if chosen.has_draft_model else "without a draft"
            tokens, peak = (fits.context_tokens, fits.peak_bytes or 0) if fits else (0, 0)
            why = f"{fails.context_tokens} does not: {fails.outcome}" if fails else "nothing longer was tried"
            click.echo(f"{name}: {tokens} tokens in {mib(peak)} of {mib(limit.bytes)}; {why}; the plan said {said}")
            rows.append({"draft": chosen.has_draft_model, "tokens": tokens, "peak_bytes": peak, "planned": said})
            rows[-1] |= {"witness": fits.witness if fits else "", "step": lengths[0]}
    click.echo(
        json.dumps({"benchmark": "longest_context", "device": device, "budget_bytes": limit.bytes, "rows": rows})
    )


if __name__ == "__main__":
    main()
