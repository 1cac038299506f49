"""Time the 4-bit product of autotune/engine/int4.py beside PyTorch's own (tinygemm), on an NVIDIA GPU.

Example: python -m benchmarks.int4_speed --shapes "8B o,8B gate_up"

No model is needed: weights are random. Each tiling is first checked against a product in float64. Then, in replayed
CUDA graphs and with the weights in so many copies that the L2 cache does not serve them, each is timed at 1, 5 and 16
tokens in rounds over all; and the tiling that layers use, beside tinygemm at 1 to 16 tokens and unpacking at more.
Medians in µs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click
import torch

from autotune.engine import int4

SHAPES = {  # outputs x inputs, of Llama-3-8B and Llama-3.2-1B with merged projections
    "8B gate_up": (28672, 4096),
    "8B qkv": (6144, 4096),
    "8B down": (4096, 14336),
    "8B o": (4096, 4096),
    "8B lm_head": (128256, 4096),
    "1B gate_up": (16384, 2048),
    "1B qkv": (3072, 2048),
    "1B down": (2048, 8192),
    "1B o": (2048, 2048),
}
COUNTS = (1, 2, 4, 5, 6, 8, 16)  # tokens of a decode step or of a verification
MANY_COUNTS = (32, 64, 128)  # tokens, around where unpacking begins to pay
TILES = (  # outputs, warps, stages
    *((64, 4, 3), (64, 4, 4), (64, 2, 3), (64, 2, 4), (64, 2, 5), (128, 4, 3), (128, 4, 4)),
    *((32, 1, 4), (32, 1, 6), (32, 2, 4)),
)
COPIES_BYTES = 200 * 10**6  # of one thing, four times the L2 cache of an H100 or H200 (50 MB, NVIDIA)
BYTES_PER_US = 4e6  # 4 TB/s: what an H200 reads (3.9 to 4.1 measured, `bandwidth_bytes_per_s` in recorded/*/run.json)
ROUNDS = 7  # timed replays, of which the median counts

Tiles = tuple[int, int, int, int]  # outputs, shares, warps, stages
Case = tuple[Tiles, int]  # and tokens
Graph = tuple[torch.cuda.CUDAGraph, int]  # and its launches


def shares_of(width: int, blocks: int, outputs: int) -> list[int]:
    """Into how many parts the inputs may be cut so that the programs are between 64 and 2400."""
    tiles = -(-width // outputs)
    found = [n for n in (1, 2, 4, 7, 8, 14, 16) if blocks % n == 0 and 64 <= tiles * n <= 2400]
    return found[:4] or [1]


def small(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randint(-(2**15), 2**15, (16, 1040, 64), generator=generator, device="cuda").short()
    scale_zero = torch.randn((32, 1040, 2), generator=generator, device="cuda").bfloat16()
    return torch.randn((tokens, 4096), generator=generator, device="cuda").bfloat16(), packed, scale_zero


def compile_one(case: Case) -> None:
    """One variant into Triton's cache on disk, by running it on a small product."""
    tiles, tokens = case
    int4.multiply(*small(tokens), int4.counters(1040, "cuda"), tiles=tiles)
    torch.cuda.synchronize()


def check(case: Case) -> str:
    """What is wrong with one variant."""
    tiles, tokens = case
    counters = int4.counters(1040, "cuda")
    for count in (1, 5, 8) if tokens == 8 else (9, 16, 40):
        rows, packed, scale_zero = small(count)
        weights = int4.unpack_slowly(packed, scale_zero)
        expected = rows.double() @ weights.double().T
        found = [int4.multiply(rows, packed, scale_zero, counters, tiles=tiles) for _ in range(3)]
        error = ((found[0].double() - expected).norm() / expected.norm()).item()
        if not error < 0.003:
            return f"error {error:.4f} at {count} tokens"
        if not all(torch.equal(found[0], other) for other in found[1:]):
            return f"not repeatable at {count} tokens"
        if counters.any():
            return "counters are not zero afterwards"
        if (int4.unpack(packed, scale_zero, 16, 1000) != weights[16:1000]).float().mean() > 1e-5:  # rounded twice
            return "unpacked weights differ"
    return ""


class Weights:
    """Random weights of one shape in several copies, which each kernel reads in its own order."""

    def __init__(self, width: int, columns: int) -> None:
        self.width, self.columns = width, columns
        self.copies = max(2, -(-COPIES_BYTES // (width * columns // 2)))
        words = torch.randint(-(2**31), 2**31, (width * columns // 8,), device="cuda", dtype=torch.int32)
        self.words = [words.clone() for _ in range(self.copies)]
        pair = torch.randn((columns // 128, width, 2), device="cuda").bfloat16() / 64
        self.pairs = [pair.clone() for _ in range(self.copies)]
        self.counters = int4.counters(width, "cuda")
        self.rows = torch.randn((max(MANY_COUNTS), columns), device="cuda").bfloat16()

    def packed(self, copy: int) -> torch.Tensor:
        return self.words[copy].view(torch.int16).view(-1, self.width, int4.plane(self.columns))

    def tinygemm(self, copy: int, count: int) -> torch.Tensor:
        packed = self.words[copy].view(self.width // 8, self.columns // 128, 32, 4)
        return torch.ops.aten._weight_int4pack_mm(self.rows[:count], packed, 128, self.pairs[copy])  # type: ignore[no-any-return]

    def ours(self, copy: int, count: int, tiles: Tiles | None = None) -> torch.Tensor:
        return int4.multiply(self.rows[:count], self.packed(copy), self.pairs[copy], self.counters, tiles=tiles)

    def unpacked(self, copy: int, count: int) -> torch.Tensor:
        output = self.rows.new_empty((count, self.width))
        step = 2**24 // self.columns
        for begin in range(0, self.width, step):
            end = min(self.width, begin + step)
            output[:, begin:end] = self.rows[:count] @ int4.unpack(self.packed(copy), self.pairs[copy], begin, end).T
        return output

    def graph(self, run: Callable[..., torch.Tensor], *arguments: Any) -> Graph:
        """A recorded graph of a product for each copy, or of 20 in turns."""
        launches = max(20, self.copies)
        run(0, *arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(launches):
                run(number % self.copies, *arguments)
        return graph, launches


def timed(graphs: dict[Any, Graph], rounds: int = ROUNDS) -> dict[Any, float]:
    """µs of one launch for each: the median of rounds over all, after one that does not count."""
    marks: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {key: [] for key in graphs}
    for number in range(rounds + 1):
        for key, (graph, _) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            if number:
                marks[key].append((begin, end))
    torch.cuda.synchronize()
    return {
        key: round(statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1000 / graphs[key][1], 2)
        for key, pairs in marks.items()
    }


def one_shape(name: str, width: int, columns: int) -> dict[str, Any]:
    weights, blocks = Weights(width, columns), columns // (4 * int4.plane(columns))
    floor = (width * columns / 2 + columns // 128 * width * 4) / BYTES_PER_US
    click.echo(f"{name} {width} x {columns}: {floor:.1f} µs at 4 TB/s")
    tilings = [(n, shares, *rest) for n, *rest in TILES for shares in shares_of(width, blocks, n)]
    best = {}
    for count in (1, 5, 16):
        found = timed({tiles: weights.graph(weights.ours, count, tiles) for tiles in tilings})
        ranked = sorted(found.items(), key=lambda item: item[1])
        best[count] = [["/".join(map(str, tiles)), us] for tiles, us in ranked[:6]]
        shown = ", ".join(f"{tiles} {us:.1f}" for tiles, us in best[count])
        click.echo(f"  {count:2} tokens, outputs/shares/warps/stages: {shown}; worst {ranked[-1][1]:.1f}")
        used = "/".join(map(str, int4._tiles(width, blocks, count)))
        click.echo(f"            used: {used}")
    runs = {("tinygemm", n): weights.graph(weights.tinygemm, n) for n in COUNTS}
    runs |= {("ours", n): weights.graph(weights.ours, n) for n in (*COUNTS, *MANY_COUNTS)}
    runs |= {("unpacked", n): weights.graph(weights.unpacked, n) for n in MANY_COUNTS}
    table = timed(runs)
    for what in dict.fromkeys(who for who, _ in table):
        click.echo(f"  {what:9} " + "  ".join(f"{n}: {us:.1f}" for (who, n), us in table.items() if who == what))
    return {"best": best, "table": {f"{who} {n}": us for (who, n), us in table.items()}}


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True)
def main(shapes: str) -> None:
    began = time.monotonic()
    cases = [((n, shares, *rest), tokens) for n, *rest in TILES for shares in (1, 2) for tokens in (8, 16)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context) as pool:
        list(pool.map(compile_one, cases))
    wrong = {case: why for case in cases if (why := check(case))}
    for case, why in wrong.items():
        click.echo(f"WRONG outputs, shares, warps, stages; tokens {case}: {why}")
    click.echo(f"{len(cases) - len(wrong)} of {len(cases)} variants are right, at {time.monotonic() - began:.0f} s")
    results = {}
    for name in shapes.split(","):
        results[name] = one_shape(name, *SHAPES[name])
        torch.cuda.empty_cache()
    click.echo(f"in {time.monotonic() - began:.0f} s")
    device = torch.cuda.get_device_name()
    click.echo(json.dumps({"device": device, "torch": torch.__version__, "wrong": len(wrong), "us": results}))


if __name__ == "__main__":
    main()
