"""Whether any combination of the engine's knobs is slower on a CPU than stock `generate` doing the same.

Both run the same loaded weights of the bundled pair on the same prompts of real text, one right after the other, in
every round. Stock runs with its own cache of the same kind (static, quantized by quanto, fp8), prompt lookup, assisted
generation with a constant depth, and chunked prefill. Where it refuses a cache, it runs the same with its dynamic cache
(what decides is whether it raises); in assisted generation it prefills the prompt whole, whatever the chunk.

A rate is all new tokens over the whole request (`end_to_end`), the tokens after the first that were handed over, over
the time since then (`decode`), or the steps in that time (`steps`: what is left where a quantized cache led to another
text, whose drafts are believed more or less often). A ratio is ours over stock's in one round: the table has the
geometric mean over the rounds with its 95 % interval (Student's t), the slowest first. The first round warms up and is
not counted.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from autotune.config import Configuration, LoadGroup, parse_tokens
from autotune.demo import DRAFT, TARGET, held_out_text
from autotune.engine.decode import NGRAM, Engine
from autotune.engine.grouped import use_grouped
from autotune.engine.support import full_precision
from autotune.measure.inputs import prepare, windows
from autotune.policy.compare import t95

Row = dict[str, Any]
CACHES = "dynamic", "static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8"
DRAFTS = "none", "prompt-lookup", "draft"
RATES = "end_to_end", "decode", "steps"
PROMPTS = 8  # a round uses one
DEPTH = 4  # tokens speculated per verification, ours and stock's
CHUNK = 512  # tokens of a prompt prefilled at a time, where it is not prefilled whole
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STOCK_CACHES: dict[str, Row] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "quantized-fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
} | {
    f"quantized-{bits}": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": bits}}
    for bits in (8, 4, 2)
}


class Stream:
    """Notes when tokens reached the host: a streamer for `generate`, and `on_tokens` for the engine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.tokens: list[list[int]] = []
        self.times: list[float] = []

    def note(self, tokens: list[int]) -> None:
        self.times.append(self.clock())
        self.tokens.append(tokens)

    def put(self, tokens: torch.Tensor) -> None:
        self.note(tokens.flatten().tolist())

    def end(self) -> None:
        pass

    def figures(self, began: float, ended: float) -> Row:
        text = [token for part in self.tokens for token in part]
        later = len(text) - len(self.tokens[0])
        decode_s = self.times[-1] - self.times[0]
        rates = {"end_to_end": len(text) / (ended - began), "decode": later / decode_s}
        return {**rates, "steps": (len(self.tokens) - 1) / decode_s, "text": text}


def ours(
    engine: Engine, configuration: Configuration, prompt: list[int], new_tokens: int, clock: Callable[[], float]
) -> Row:
    stream = Stream(clock)
    began = clock()
    engine.generate(prompt, configuration, new_tokens, on_tokens=stream.note)
    return stream.figures(began, clock())


def stock(
    engine: Engine,
    configuration: Configuration,
    cache: str,
    prompt: list[int],
    new_tokens: int,
    clock: Callable[[], float],
) -> Row:
    """The same by `generate`, with the cache named. Raises what `generate` raises where it cannot."""
    settings = copy.deepcopy(engine.target.generation_config)
    settings.update(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, **STOCK_CACHES[cache])
    options: Row = {}
    if configuration.prefill_chunk:
        settings.prefill_chunk_size = configuration.prefill_chunk
    if configuration.draft == "prompt-lookup":
        settings.update(prompt_lookup_num_tokens=DEPTH, max_matching_ngram_size=NGRAM)
    elif configuration.draft == "draft":
        assert engine.draft is not None
        constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        engine.draft.generation_config.update(num_assistant_tokens=DEPTH, eos_token_id=None, **constant)
        options["assistant_model"] = engine.draft
    stream = Stream(clock)
    began = clock()
    inputs = torch.tensor([prompt])
    engine.target.generate(
        inputs, attention_mask=torch.ones_like(inputs), generation_config=settings, streamer=stream, **options
    )
    ended = clock()
    del stream.tokens[0], stream.times[0]  # the prompt
    return stream.figures(began, ended)


class Pair:
    """One combination at one context, ours and stock's."""

    def __init__(self, engine: Engine, configuration: Configuration, context: int) -> None:
        self.engine, self.configuration, self.context = engine, configuration, context
        self.stock_cache = configuration.cache
        self.rounds: list[tuple[Row, Row]] = []

    def run(self, prompt: list[int], new_tokens: int, clock: Callable[[], float], stock_first: bool) -> tuple[Row, Row]:
        theirs: Row = {}
        if stock_first:
            theirs = self.stock(prompt, new_tokens, clock)
        self.attend(self.configuration.attention)
        self.use_grouped()
        mine = ours(self.engine, self.configuration, prompt, new_tokens, clock)
        if not stock_first:
            theirs = self.stock(prompt, new_tokens, clock)
        return mine, theirs

    def stock(self, prompt: list[int], new_tokens: int, clock: Callable[[], float]) -> Row:
        self.attend(self.configuration.attention)
        return stock(self.engine, self.configuration, self.stock_cache, prompt, new_tokens, clock)

    def attend(self, attention: str) -> None:
        """By transformers' own function; `use_grouped` then does as the engine does when it loads."""
        for model in (self.engine.target, self.engine.draft):
            assert model is not None
            model.set_attn_implementation(attention)

    def use_grouped(self) -> None:
        for model in (self.engine.target, self.engine.draft):
            assert model is not None
            if model.dtype == torch.bfloat16:
                use_grouped(model)

    def warm_up(self, prompt: list[int], new_tokens: int) -> None:
        """Also finds out what stock can do."""
        try:
            self.run(prompt, new_tokens, time.perf_counter, stock_first=False)
        except Exception as error:  # whatever `generate` raises for what it cannot do
            if self.stock_cache == "dynamic":
                raise
            print(f"{self.configuration}: stock: {type(error).__name__}: {error}", flush=True)
            self.stock_cache = "dynamic"
            self.run(prompt, new_tokens, time.perf_counter, stock_first=False)

    def row(self) -> Row:
        knobs = {name: getattr(self.configuration, name) for name in ("weights", "attention", "cache", "draft")}
        row: Row = {**knobs, "chunk": self.configuration.prefill_chunk, "context": self.context}
        row |= {"stock_cache": self.stock_cache, "rounds": len(self.rounds)}
        row["same_text"] = sum(mine["text"] == theirs["text"] for mine, theirs in self.rounds)
        for name in RATES:
            row[name] = round(statistics.median(mine[name] for mine, _ in self.rounds), 2)
            row[f"stock_{name}"] = round(statistics.median(theirs[name] for _, theirs in self.rounds), 2)
            ratios = [mine[name] / theirs[name] for mine, theirs in self.rounds]
            row[f"{name}_ratio"], row[f"{name}_interval"] = interval(ratios)
        return row


def interval(ratios: list[float]) -> tuple[float, list[float]]:
    """The geometric mean and its 95 % interval; [0, 0] for a single ratio, which has none."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return round(math.exp(mean), 4), [0.0, 0.0]
    half = t95(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return round(math.exp(mean), 4), [round(math.exp(mean - half), 4), round(math.exp(mean + half), 4)]


def combinations(weights: list[str], contexts: list[int]) -> Iterator[tuple[Configuration, int]]:
    """Every legal combination, at the contexts that it makes a difference at."""
    every = product(contexts, weights, ("sdpa", "eager"), CACHES, DRAFTS, (0, CHUNK))
    for context, word, attention, cache, draft, chunk in every:
        if chunk >= context:
            continue
        yield (
            Configuration(word, draft=draft, depth=DEPTH, cache=cache, attention=attention, prefill_chunk=chunk),
            context,
        )


def report(rows: list[Row], version: str = torch.__version__) -> None:
    """The table, the slowest first, and one JSON line; `same` counts the rows in which stock can do the same."""
    rows = sorted(rows, key=lambda row: float(min(row["end_to_end_ratio"], row["decode_ratio"])))
    heads = "".join(f"{name:>22}{'ratio':>6}{'':>14}" for name in ("tokens/s, end to end", "decode", "steps/s"))
    knobs = f"{'weights':<12} {'attention':<9} {'cache':<13} {'draft':<13} {'chunk':>5}"
    click.echo(f"{'context':>7} {knobs}{heads} same text")
    for row in rows:
        cells = ""
        for name in RATES:
            rates = f"{row[name]:.1f} / {row[f'stock_{name}']:.1f}"
            low, high = row[f"{name}_interval"]
            cells += f" {rates:>21} {row[f'{name}_ratio']:>5.2f} [{low:.2f}, {high:.2f}]"
        other = "" if row["stock_cache"] == row["cache"] else "stock: the same with the dynamic cache"
        if row["chunk"] and row["draft"] != "none":
            other += f"{', ' if other else 'stock: '}prefilled whole"
        knobs = f"{row['weights']:<12} {row['attention']:<9} {row['cache']:<13} {row['draft']:<13} {row['chunk']:>5}"
        click.echo(f"{row['context']:>7} {knobs}{cells} {row['same_text']}/{row['rounds']} {other}")
    same = _figures([row for row in rows if row["stock_cache"] == row["cache"]])
    line = {"benchmark": "engine_speed_cpu", "torch": version, **_figures(rows), "same": same}
    click.echo(json.dumps(line | {"rows": rows}))


def _figures(rows: list[Row]) -> Row:
    """How many there are, the smallest ratio of each rate, and in how many it is below 1 by more than its error."""
    smallest = {f"smallest_{name}": min((row[f"{name}_ratio"] for row in rows), default=None) for name in RATES}
    slower = {f"surely_slower_{name}": sum(row[f"{name}_interval"][1] < 1 for row in rows) for name in RATES}
    return {"combinations": len(rows), **smallest, **slower}


@click.command()
@click.option(
    "--weights", default="full,quanto-int8,bnb-nf4,quanto-int4", show_default=True, help="full: as the CPU has"
)
@click.option("--contexts", default="512,2k", show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--repeats", default=6, show_default=True, help="rounds, at most")
@click.option("--seconds", default=360.0, show_default=True, help="no round begins that would not end by then")
@click.option("--shard", default="1/1", show_default=True, help="which part of the combinations, of how many")
@click.option("--only", default="", help="words that a combination must have, such as 'static,draft,sdpa,2048'")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True, help="cpu: process time")
@click.option("--join", "joined", multiple=True, type=click.Path(path_type=Path, exists=True), help="shards' outputs")
def main(
    weights: str,
    contexts: str,
    new_tokens: int,
    repeats: int,
    seconds: float,
    shard: str,
    only: str,
    clock: str,
    joined: tuple[Path, ...],
) -> None:
    """Compare every combination with stock `generate` on this process's cores; the last line is one JSON object.

    Example: taskset -c 0,1 python -m benchmarks.engine_speed_cpu --shard 1/8 > shard-1.txt
    All shards in one table: python -m benchmarks.engine_speed_cpu --join shard-1.txt --join shard-2.txt ...
    """
    if joined:
        parts = [json.loads(path.read_text().splitlines()[-1]) for path in joined]
        report([row for part in parts for row in part["rows"]], parts[0]["torch"])
        return
    began = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if clock == "wall" else 1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    words = [full_precision("cpu") if word == "full" else word for word in weights.split(",")]
    lengths = [parse_tokens(context) for context in contexts.split(",")]
    mine, shards = map(int, shard.split("/"))
    wanted = set(only.split(",")) - {""}
    chosen = [
        (configuration, context)
        for configuration, context in combinations(words, lengths)
        if wanted <= {*vars(configuration).values(), str(context), str(configuration.prefill_chunk)}
    ]
    random.Random(0).shuffle(chosen)  # so that all shards take about as long
    chosen = chosen[mine - 1 :: shards]
    engines: dict[str, Engine] = {}
    for word in dict.fromkeys(configuration.weights for configuration, _ in chosen):
        engines[word] = Engine.load(str(TARGET), LoadGroup(word, draft=str(DRAFT), draft_weights=word), "cpu")
    pairs = [Pair(engines[configuration.weights], configuration, context) for configuration, context in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        text, inputs = Path(scratch) / "text.txt", str(Path(scratch) / "inputs.npz")
        text.write_text(held_out_text(), encoding="utf-8")
        prepare(str(TARGET), str(text), None, lengths, PROMPTS, inputs)
        prompts = {length: windows(inputs, length)[0] for length in lengths}
    for pair in pairs:
        pair.warm_up(prompts[pair.context][0], new_tokens)
    longest = 0.0
    for number in range(repeats):
        round_began = time.perf_counter()
        if number and round_began + longest - began > seconds:
            break
        for index, pair in enumerate(pairs):
            prompt = prompts[pair.context][number % PROMPTS]
            pair.rounds.append(pair.run(prompt, new_tokens, CLOCKS[clock], stock_first=(number + index) % 2 == 1))
        longest = max(longest, time.perf_counter() - round_began)
        click.echo(f"round {number + 1}: {longest:.0f} s for {len(pairs)} combinations", err=True)
    report([pair.row() for pair in pairs])


if __name__ == "__main__":
    main()
