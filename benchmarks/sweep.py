"""Ground truth for the search: every legal configuration of a space measured at every context, under no budget.

Under no budget, because any budget can be replayed on what was measured: the footprint of each is known
(`search_regret.py` does). Measured as a run measures a candidate, through `trial.Trials`, with nothing cut short: no
bar ends the rounds early. Beside the space, the stock configurations that a run begins with, and each draft model
resident but idle, which the search may also try.

One load group after another, in a seeded order, so that a sweep that is not finished holds whole groups of every kind.
The file is JSON Lines: the first line tells what was swept, where and with what; then a line a measurement, appended
and forced to the disk. The same command continues where it ended; a finished sweep is compressed. Several machines, or
several GPUs of one, can share a sweep: `--shard 2/4` measures the second of four parts, each of whole load groups, and
`--join` puts the parts together. A line has the record (failures as they came; step times summed up, rounds kept: a
replay draws its noise from them) and beside it

- `took_s`: all that this measurement took, as a run would wait for it, a load included;
- `load_s`: what of that went to starting a worker and loading, where that was needed, as seen from outside;
- `quality_s`: what of that went to measuring quality, where it was not known yet (the same text has the same quality);
- `load_peak_bytes`: the footprint while loading.

Draft models are called draft1, draft2, ... in it, wherever their folders are.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import click

from autotune import run
from autotune.config import Budget, Configuration, LoadGroup, Record, Workload, mib, parse_tokens
from autotune.demo import DRAFT, TARGET
from autotune.model.fingerprint import fingerprint
from autotune.model.folder import PlanError
from autotune.request import Request, check_inputs
from autotune.results import RunError
from autotune.search.space import Space, SpaceError, read_space, stock_configurations
from autotune.search.watch import Watch
from autotune.trial.trials import Trials
from benchmarks.prepare import UNLIMITED, device_option, model_option

IDENTITY = ("model", "drafts", "workload", "device", "hardware", "space", "sample", "groups", "seed", "shard")
OWN = ("shard", "device")  # of these, what parts of one sweep do not share

Pair = tuple[Configuration, int]


class Notes(Watch):
    """Says on stderr what a run notes."""

    def note(self, text: str) -> None:
        if text:
            click.echo(text, err=True)


class Stamps:
    """When the worker last said what it was doing."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        self.at.setdefault(text, time.monotonic())


def configurations(space: Space, full_precision: str) -> list[Configuration]:
    """The stock ones, all of the space, and those with a draft model once more with it idle; each once."""
    legal = list(space.configurations())
    idle = [configuration.replace(depth=0) for configuration in legal if configuration.has_draft_model]
    return list(dict.fromkeys([*stock_configurations(full_precision, space), *legal, *idle]))


def by_group(asked: list[Configuration], stock: int, sample: int | None, groups: int | None, seed: int) -> list[Any]:
    """The configurations in the order in which they are measured: stock groups first, the others shuffled.

    With `groups`, that many load groups drawn at random; with `sample`, that many configurations of what is left. The
    first `stock` are always among them.
    """
    draw = random.Random(seed)
    rest = asked[stock:]
    others = list(dict.fromkeys(c.load_group for c in rest))
    draw.shuffle(others)
    kept = set(others[:groups])
    rest = [configuration for configuration in rest if configuration.load_group in kept]
    if sample is not None and sample < len(rest):
        drawn = set(draw.sample(rest, sample))
        rest = [configuration for configuration in rest if configuration in drawn]
    order = {group: at for at, group in enumerate(dict.fromkeys([c.load_group for c in asked[:stock]] + others))}
    return sorted([*asked[:stock], *rest], key=lambda c: order[c.load_group])


def part(order: list[Configuration], number: int, count: int) -> list[Configuration]:
    """The part with that number, 1 to `count`: whole load groups, each given to the part that has the fewest yet."""
    sizes, parts = Counter(c.load_group for c in order), [0] * count
    given: dict[LoadGroup, int] = {}
    for group in sorted(sizes, key=lambda group: -sizes[group]):
        given[group] = parts.index(min(parts))
        parts[given[group]] += sizes[group]
    return [configuration for configuration in order if given[configuration.load_group] == number - 1]


def join(paths: list[Path], out: Path) -> dict[str, Any]:
    """Put parts of one sweep together, as far as they go. Returns the figures of the last line."""
    headers, lines = [], []
    for path in paths:
        first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
        headers.append(first)
        lines += rest
    differing = [key for key in IDENTITY for header in headers if key not in OWN and header[key] != headers[0][key]]
    shards = Counter(header["shard"] for header in headers)
    if differing or max(shards.values()) > 1:
        what = f"another {', '.join(dict.fromkeys(differing))}" if differing else "the same part twice"
        raise click.UsageError(f"--join: these are not parts of one sweep: they have {what}")
    count = int(headers[0]["shard"].partition("/")[2])
    chosen = sum(header["chosen"] for header in headers)
    header = {**headers[0], "shard": "", "parts": len(headers), "chosen": chosen}
    out.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    pairs = chosen * len(header["workload"]["contexts"])
    finished = len(headers) == count and len(lines) == pairs
    return {
        "benchmark": "sweep",
        "legal": header["legal"],
        "chosen": chosen,
        "pairs": pairs,
        "measured": len(lines),
        "outcomes": dict(Counter(line["record"]["outcome"] for line in lines)),
        "finished": finished,
        "out": str(compress(out)),
    }


def renamed(configuration: Configuration, names: dict[str, str]) -> Configuration:
    return configuration.replace(draft=names.get(configuration.draft, configuration.draft))


def compact(record: Record) -> dict[str, Any]:
    """The record without step times, per-window quality and the machine's state; what is empty is left out."""
    data = record.to_json()
    kept = ("round", "prompt", "new_tokens", "ttft_s", "proposed", "accepted", "verifications")
    data["samples"] = [
        {**{name: sample[name] for name in kept}, "step_s": [round(sum(sample["step_s"]), 6)]}
        for sample in record.samples
    ]
    data["quality"] = data["machine"] = None
    stock, configuration = dataclasses.asdict(Configuration()), data.pop("configuration")
    data = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in data.items()}
    data = {key: value for key, value in data.items() if value is not None and value not in ("", [], {}, ())}
    return {"configuration": {knob: word for knob, word in configuration.items() if word != stock[knob]}, **data}


def measured(trials: Trials, stamps: Stamps, configuration: Configuration, context: int) -> dict[str, Any]:
    """A record and what it took. Its keys are told at the top."""
    stamps.at.clear()
    loads, began = trials.loads, time.monotonic()
    record = trials.measure(configuration, context)
    ended = time.monotonic()
    line: dict[str, Any] = {"record": record, "took_s": round(ended - began, 4)}
    if trials.loads > loads:
        line["load_s"] = round(stamps.at.get("timing", ended) - began, 4)
        line["load_peak_bytes"] = trials._load_peak if "timing" in stamps.at else None
    if "measuring quality" in stamps.at:
        line["quality_s"] = round(ended - stamps.at["measuring quality"], 4)
    return line


def resume(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that the file holds, its first one written where there is none. A line that was cut off is dropped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    first, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
    differing = [key for key in IDENTITY if first.get(key) != header[key]]
    if differing:
        raise click.UsageError(
            f"{path} holds a sweep with another {', '.join(differing)}: give this one a file of its own with --out"
        )
    return lines


def append(file: IO[str], line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def compress(path: Path) -> Path:
    """The finished file as .gz, the same bytes for the same content."""
    packed = path.with_name(path.name + ".gz")
    temporary = packed.with_suffix(".tmp")
    with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(path.read_bytes())
    temporary.replace(packed)
    path.unlink()
    return packed


def sweep(
    request: run.Request,
    header: dict[str, Any],
    out: Path,
    sample: int | None,
    groups: int | None,
    seed: int,
    shard: tuple[int, int] | None,
) -> dict[str, Any]:
    """Measure what the file does not hold yet, until the time is up. Returns the figures of the last line."""
    stamps, contexts = Stamps(), request.workload.contexts
    deadline = request.started + request.timeout_s
    with Trials(str(request.model), request.workload, request.budget, request.out, stamps) as trials:
        identity = {"model": fingerprint(request.model)}
        info, space = run._prepare(request, trials, {"identity": identity}, Notes())
        names = {str(draft): f"draft{number}" for number, draft in enumerate(request.drafts, 1)}
        paths = {name: path for path, name in names.items()}
        precision = info["environment"]["full_precision"]
        asked, stock = configurations(space, precision), len(stock_configurations(precision, space))
        order = by_group(asked, stock, sample, groups, seed)
        if shard is not None:
            order = part(order, *shard)
        pairs: list[Pair] = list(itertools.product(order, contexts))
        choices = {**space.choices, "draft": [names.get(word, word) for word in space.choices["draft"]]}
        header |= {
            "environment": info["environment"],
            "hardware": info["environment"]["device"],
            "text": info["text"],
            "reference": info["reference"],
            "space": json.loads(json.dumps(choices)),
            "dropped": space.dropped,
            "legal": len(asked),
            "chosen": len(order),
        }
        done: dict[Pair, str] = {}
        for line in resume(out, header):
            record = Record.from_json(line["record"])
            record = dataclasses.replace(record, configuration=renamed(record.configuration, paths))
            done[record.configuration, record.context_tokens] = record.outcome
            trials.learn(record)
        click.echo(
            f"{len(asked)} configurations in {len({c.load_group for c in asked})} load groups; to measure: "
            f"{len(order)} in {len({c.load_group for c in order})}, at {len(contexts)} contexts: {len(pairs)} pairs, "
            f"{len(done)} of them known",
            err=True,
        )
        began, before = time.monotonic(), len(done)
        with out.open("a") as file:
            for configuration, context in pairs:
                if (configuration, context) in done:
                    continue
                if time.monotonic() >= deadline:
                    break
                line = measured(trials, stamps, configuration, context)
                record = line["record"]
                named = dataclasses.replace(record, configuration=renamed(configuration, names))
                append(file, {**line, "record": compact(named)})
                done[configuration, context] = record.outcome
                left = (time.monotonic() - began) / (len(done) - before) * (len(pairs) - len(done))
                click.echo(f"{len(done)}/{len(pairs)} {_words(named)}  {left / 60:.0f} min left", err=True)
    finished = len(done) == len(pairs)
    return {
        "benchmark": "sweep",
        "legal": len(asked),
        "chosen": len(order),
        "pairs": len(pairs),
        "measured": len(done),
        "outcomes": dict(Counter(done.values())),
        "finished": finished,
        "out": str(compress(out) if finished and shard is None else out),
    }


def _words(record: Record) -> str:
    c = record.configuration
    words = [c.weights, f"head {c.lm_head}", c.draft, c.draft_weights, str(c.depth), c.cache, c.attention]
    rate = f"{record.tokens_per_s:.1f} tokens/s, {mib(record.peak_bytes or 0)}" if record.tokens_per_s else ""
    return f"{' '.join(words)} {c.prefill_chunk} {c.launch} at {record.context_tokens}: {record.outcome} {rate}"


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise click.UsageError(f"--shard {text}: give a part's number and how many there are, like 2/4")
    return int(number), int(count)


@click.command()
@model_option
@click.option("--draft", "drafts", type=click.Path(path_type=Path, exists=True), multiple=True, help="may be repeated")
@click.option(
    "--text", type=click.Path(path_type=Path, exists=True), help="what is read and predicted; else the bundled"
)
@click.option("--space", "space_name", default="default", show_default=True, help="a search space or a TOML file")
@click.option("--contexts", default="512,2k,4k", show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@device_option
@click.option("--sample", type=click.IntRange(1), help="only that many configurations, drawn at random")
@click.option("--groups", type=click.IntRange(1), help="only of that many load groups, drawn at random")
@click.option("--seed", default=0, show_default=True, help="of the order and of what is drawn")
@click.option("--shard", default="", help="measure one part of the load groups, like 2/4: the second of four")
@click.option("--join", "joined", type=click.Path(path_type=Path, exists=True), multiple=True, help="a part; repeat it")
@click.option("--note", default="", help="what a reader of the file should know, kept in its first line")
@click.option("--timeout", default=3600, show_default=True, help="seconds; the same command continues")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the file, ending in .jsonl")
def main(
    model: Path | None,
    drafts: tuple[Path, ...],
    text: Path | None,
    space_name: str,
    contexts: str,
    new_tokens: int,
    device: str,
    sample: int | None,
    groups: int | None,
    seed: int,
    shard: str,
    joined: tuple[Path, ...],
    note: str,
    timeout: int,
    out: Path,
) -> None:
    """Measure every legal configuration under no budget; the last line is one JSON object.

    Example: python -m benchmarks.sweep --space quick --contexts 128,512 --out quick.jsonl
    """
    started = time.monotonic()
    if out.suffix != ".jsonl":
        raise click.UsageError(f"--out {out}: the name must end in .jsonl; .gz is added when the sweep is finished")
    if out.with_name(out.name + ".gz").exists():
        raise click.UsageError(f"--out {out}.gz is a finished sweep: give another file")
    if joined:
        click.echo(json.dumps(join(list(joined), out)))
        return
    number = _shard(shard) if shard else None
    model, drafts = (model, drafts) if model else (TARGET, (DRAFT,))
    workload = Workload(
        tuple(parse_tokens(word) for word in contexts.split(",")),
        new_tokens=new_tokens,
        text=str(text) if text else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            request = Request(
                model=model,
                drafts=list(drafts),
                budget=Budget(UNLIMITED, device),
                workload=workload,
                space=read_space(space_name),
                space_name=space_name,
                out=Path(folder),
                timeout_s=timeout,
                started=started,
            )
            shapes = check_inputs(request)
            header = {
                "sweep": 1,
                "note": note,
                "model": fingerprint(model)["weights_sha256"],
                "drafts": [fingerprint(draft)["weights_sha256"] for draft in drafts],
                "workload": json.loads(
                    json.dumps({**dataclasses.asdict(workload), "text": text.name if text else None})
                ),
                "device": request.budget.device,
                "space_name": Path(space_name).stem,
                "sample": sample,
                "groups": groups,
                "seed": seed,
                "shard": shard,
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "shapes": dict(
                    zip(
                        ["model", *(f"draft{number}" for number in range(1, len(drafts) + 1))],
                        [dataclasses.asdict(shapes[str(path)]) for path in (model, *drafts)],
                        strict=True,
                    )
                ),
            }
            figures = sweep(request, header, out, sample, groups, seed, number)
        except (PlanError, SpaceError, RunError) as error:
            raise click.UsageError(str(error)) from None
    click.echo(f"{figures['measured']} of {figures['pairs']} pairs are in {figures['out']}: {figures['outcomes']}")
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
