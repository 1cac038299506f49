"""How fast the engine decodes and prefills beside stock `generate`, on the synthetic rig, at batch 1.

A decode step reads every weight once, so its floor is the weights' bytes over the memory's bandwidth; stock `generate`
is an order of magnitude above it, since the host launches thousands of kernels for a step. The same configuration gave
15 and 28 tokens/s minutes apart, so only interleaved repeats are compared: every round runs every configuration once.
(What `torch.compile` compiled belongs to one cache, so compiled configurations are repeated one by one, at the end.)

A rate is new tokens after the first, over the time from the first to the last. Before each timed request the same one
untimed records the steps. Peaks are the allocator's, over the timed request. MAD is the median absolute
deviation from the median.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from autotune.config import Configuration, LoadGroup, parse_tokens
from autotune.engine.attention import register_split_kv
from autotune.engine.decode import Engine
from autotune.engine.support import Unsupported

Row = dict[str, Any]
_BEGAN = time.perf_counter()  # seconds, for what is noted as it goes


class _Clock:
    """A streamer for `generate` that notes when each token reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def stock(engine: Engine, prompt: list[int], new_tokens: int, chunk: int) -> Row:
    """Stock `generate` with the dynamic cache."""
    clock = _Clock()
    inputs = torch.tensor([prompt], device=engine.device)
    options: dict[str, Any] = {"prefill_chunk_size": chunk} if chunk else {}
    began = time.perf_counter()
    engine.target.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    first, last = clock.times[1], clock.times[-1]
    return {"tokens_per_s": (new_tokens - 1) / (last - first), "ttft_s": first - began}


def ours(engine: Engine, configuration: Configuration, prompt: list[int], new_tokens: int) -> Row:
    engine.generate(prompt, configuration, new_tokens)
    _reset_peaks()
    result = engine.generate(prompt, configuration, new_tokens)
    row = {"tokens_per_s": (len(result.tokens) - 1) / result.decode_s, "ttft_s": result.ttft_s}
    _note(
        f"{configuration.launch}, {configuration.attention}, {configuration.cache}, depth {configuration.depth}: {row}"
    )
    if result.proposed:
        row |= {"acceptance": result.accepted / result.proposed, "per_step": result.decode_s / len(result.step_s)}
    return row


def configurations(weights: str, depths: tuple[int, ...], compiled: bool) -> dict[str, Configuration]:
    """What is compared with stock, by name."""
    plain = Configuration(weights=weights, cache="static")
    split = plain.replace(attention="split_kv")
    if compiled:
        return {
            "compile, sdpa": plain.replace(launch="compile"),
            "compile, split_kv": split.replace(launch="compile"),
            "compile, split_kv, 4-bit": split.replace(launch="compile", cache="quantized-4"),
        }
    graph = split.replace(launch="graph")
    named = {
        "eager, sdpa": plain,
        "graph, sdpa": plain.replace(launch="graph"),
        "graph, split_kv": graph,
        "graph, split_kv, 4-bit": graph.replace(cache="quantized-4"),
        "graph, split_kv, fp8": graph.replace(cache="quantized-fp8"),
    }
    for depth in depths:
        named[f"graph, split_kv, depth {depth}"] = graph.replace(draft="draft", depth=depth)
    if depths:
        middle, deepest = sorted(depths)[len(depths) // 2], max(depths)
        quantized = graph.replace(cache="quantized-4", draft="draft", depth=middle)
        named[f"graph, split_kv, 4-bit, depth {middle}"] = quantized
        adaptive = graph.replace(draft="draft", depth=deepest, speculation="adaptive")
        named[f"graph, split_kv, adaptive to {deepest}"] = adaptive
    return named


def switch(engine: Engine, configuration: Configuration) -> None:
    """Let the loaded models use another attention."""
    if engine.group.attention == configuration.attention:
        return
    if configuration.attention == "split_kv":
        register_split_kv(engine.device)
    for model in (engine.target, engine.draft):
        if model is not None:
            model.set_attn_implementation(configuration.attention)
    engine.group = dataclasses.replace(engine.group, attention=configuration.attention)


def rounds(
    engine: Engine, named: dict[str, Configuration], prompt: list[int], new_tokens: int, repeats: int
) -> Iterator[Row]:
    """One row per configuration and round, and one of stock in each."""
    for repeat in range(repeats):
        for name, configuration in named.items():
            try:
                switch(engine, configuration)
                row = ours(engine, configuration, prompt, new_tokens)
            except Unsupported as error:
                if repeat == 0:
                    click.echo(f"{name}: unsupported: {error}")
                continue
            yield {"name": name, **row, **_peaks()}
        switch(engine, Configuration())
        engine.close()
        _reset_peaks()
        yield {"name": "stock", **stock(engine, prompt, new_tokens, 0), **_peaks()}


def prefill(engine: Engine, prompt: list[int], chunk: int, repeats: int) -> Iterator[Row]:
    plain = Configuration(cache="static", prefill_chunk=chunk)
    split = plain.replace(attention="split_kv", launch="graph")
    named = {"sdpa": plain, "split_kv": split, "split_kv, 4-bit": split.replace(cache="quantized-4")}
    for repeat in range(repeats + 1):
        seconds = {}
        for name, configuration in named.items():
            switch(engine, configuration)
            engine.close()
            seconds[f", {name}"] = engine.generate(prompt, configuration, 1).ttft_s
        switch(engine, Configuration())
        seconds[", stock"] = stock(engine, prompt, 2, chunk)["ttft_s"]
        for name, taken in seconds.items() if repeat else ():
            yield {"name": f"prefill, chunk {chunk}{name}", "ttft_s": taken}


def summarize(rows: list[Row]) -> Row:
    """Medians over the rounds of one configuration, with the rates' MAD."""
    figures = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in ("name",)}
    if "tokens_per_s" in figures:
        median = figures["tokens_per_s"]
        figures["mad"] = statistics.median(abs(row["tokens_per_s"] - median) for row in rows)
    return {"name": rows[0]["name"], "rounds": len(rows), **{key: round(value, 4) for key, value in figures.items()}}


def _note(text: str) -> None:
    click.echo(f"[{time.perf_counter() - _BEGAN:6.1f} s] {text}", err=True)


def _reset_peaks() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> Row:
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}


def _line(row: Row) -> str:
    columns = "tokens_per_s", "mad", "ttft_s", "allocated_gib", "reserved_gib", "acceptance"
    cells = [f"{row[column]:>9.3f}" if column in row else " " * 9 for column in columns]
    return f"{row['weights']:<12}{row['context']:>6}  {row['name']:<34}{' '.join(cells)}"


@click.command()
@click.option("--pair", type=click.Path(path_type=Path, exists=True), help="a folder that the rig wrote; else build it")
@click.option("--size", default="8b", show_default=True)
@click.option("--draft", default="1b", show_default=True)
@click.option("--weights", default="bnb-nf4,quanto-int4", show_default=True)
@click.option("--lm-head", default="bf16", show_default=True)
@click.option("--contexts", default="2k,16k", show_default=True)
@click.option("--depths", default="3,4,5,6", show_default=True, help="empty: no speculation")
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--chunk", default=1024, show_default=True, help="prefill chunk, ours and stock's; 0: do not measure it")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--device", default="cuda", show_default=True)
def main(
    pair: Path | None,
    size: str,
    draft: str,
    weights: str,
    lm_head: str,
    contexts: str,
    depths: str,
    new_tokens: int,
    repeats: int,
    chunk: int,
    compiled: bool,
    device: str,
) -> None:
    """Measure decode and prefill speed; the last line is one JSON object.

    Example: python -m benchmarks.engine_speed --weights bnb-nf4 --contexts 2k --no-compile
    """
    with tempfile.TemporaryDirectory() as scratch:
        if pair is None:
            from benchmarks.rig import build

            pair = Path(scratch) / "pair"
            build(pair, size, draft, 0.8, device)
            _note("built the pair")
        summaries: list[Row] = []
        for word in weights.split(","):
            drafted = {"draft": str(pair / "draft"), "draft_weights": word} if depths else {}
            group = LoadGroup(weights=word, lm_head=lm_head, **drafted)
            engine = Engine.load(str(pair / "target"), group, device)
            _note(f"loaded {word}")
            parsed = tuple(int(depth) for depth in depths.split(",")) if depths else ()
            for context in map(parse_tokens, contexts.split(",")):
                for row in _context(engine, word, context, parsed, new_tokens, repeats, chunk, compiled):
                    summaries.append({"weights": word, "context": context, **row})
                    click.echo(_line(summaries[-1]))
            engine.close()
            del engine
            _reset_peaks()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    click.echo(json.dumps({"benchmark": "engine_speed", "device": name, "torch": torch.__version__, "rows": summaries}))


def _context(
    engine: Engine,
    weights: str,
    context: int,
    depths: tuple[int, ...],
    new_tokens: int,
    repeats: int,
    chunk: int,
    compiled: bool,
) -> Iterator[Row]:
    vocabulary = engine.target.config.vocab_size - 256  # the rig's special tokens come last
    prompt = torch.randint(vocabulary, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    rows: list[Row] = []
    rows += rounds(engine, configurations(weights, depths, compiled=False), prompt, new_tokens, repeats)
    if compiled:
        for name, configuration in configurations(weights, depths, compiled=True).items():
            switch(engine, configuration)
            try:
                for _ in range(repeats):
                    rows.append({"name": name, **ours(engine, configuration, prompt, new_tokens), **_peaks()})
            except Unsupported as error:
                click.echo(f"{name}: unsupported: {error}")
    if chunk:
        rows += prefill(engine, prompt, chunk, repeats)
    for name in dict.fromkeys(row["name"] for row in rows):
        yield summarize([row for row in rows if row["name"] == name])


if __name__ == "__main__":
    main()
