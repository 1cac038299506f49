"""Time the 4-bit product of autotune/engine/int4.py beside PyTorch's own (tinygemm), on an NVIDIA GPU.

Example: python benchmarks/int4_speed.py --shapes "8B o,8B gate_up"

No model is needed: weights are random. Each tiling is first checked against a product in float32; then, under a
replayed CUDA graph and with the weights in so many copies that the L2 cache does not serve them, each is timed at 1 and
5 tokens (and 16) in rounds over all, the best beside tinygemm at 1 to 16, and unpacking at more. Medians in µs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click
import torch

from autotune.engine import int4, kernels

SHAPES = {
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
COUNTS = (1, 2, 4, 5, 6, 8, 16)
# plane, outputs, warps, stages
TILES = [
    *[(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 2, 3), (64, 64, 2, 4), (64, 64, 2, 5), (64, 64, 2, 6)],
    *[(64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 32, 2, 4), (64, 32, 1, 4), (64, 32, 1, 6)],
    *[(64, 128, 8, 4), (64, 256, 8, 4), (64, 128, 2, 4)],
]
MANY_TILES = [  # for more than 8 tokens
    *[(64, 32, 2, 4), (64, 64, 2, 4), (64, 64, 4, 4), (64, 32, 1, 4), (64, 64, 2, 3), (64, 128, 4, 4), (64, 32, 1, 6)],
]
EARLY = (0, 1, 2, 3)
L2_BYTES = 200 * 10**6
ROUNDS = 7

Key = tuple[int, int, int, int, int]  # plane, outputs, shares, warps, stages


def shares_of(width: int, columns: int, plane: int, outputs: int) -> list[int]:
    """Into how many parts the inputs may be cut so that the programs are between 64 and 2400."""
    blocks, tiles = columns // (4 * plane), -(-width // outputs)
    found = [n for n in (1, 2, 4, 7, 8, 14, 16) if n <= blocks and blocks % n == 0 and 64 <= tiles * n <= 2400]
    return found[:4] or [1]


def compile_one(case: tuple[int, int, int, int, int, bool]) -> None:
    """One variant into Triton's cache on disk, by running it on a small product."""
    plane, outputs, warps, stages, tokens, shared = case
    torch.cuda.set_device(0)
    rows, packed, scale_zero = small(plane, tokens)
    counters = int4.counters(len(packed[0]), "cuda")
    for early in EARLY if (outputs, warps) in ((64, 2), (64, 4), (128, 8), (32, 1)) else (0,):
        int4.multiply(rows, packed, scale_zero, counters, (outputs, 2 if shared else 1, warps, stages), early)
    torch.cuda.synchronize()


def small(plane: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    blocks, width = 4096 // (4 * plane), 1040
    packed = torch.randint(-(2**15), 2**15, (blocks, width, plane), generator=generator, device="cuda").short()
    scale_zero = torch.randn((32, width, 2), generator=generator, device="cuda").bfloat16()
    return torch.randn((tokens, 4096), generator=generator, device="cuda").bfloat16(), packed, scale_zero


def check(case: tuple[int, int, int, int, int, bool]) -> str:
    """What is wrong with one variant."""
    plane, outputs, warps, stages, tokens, shared = case
    counters = int4.counters(1040, "cuda")
    for count in {1, 5, 8} if tokens == 8 else {9, 16, 40}:
        rows, packed, scale_zero = small(plane, count)
        weights = int4.unpack_slowly(packed, scale_zero)
        expected = rows.double() @ weights.double().T
        tiles = (outputs, 2 if shared else 1, warps, stages)
        runs = EARLY if (outputs, warps) in ((64, 2), (64, 4), (128, 8), (32, 1)) else (0, 0)
        found = [int4.multiply(rows, packed, scale_zero, counters, tiles, early) for early in runs]
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
    """Random weights of one shape: copies in memory, whose words any plane may read in its own order."""

    def __init__(self, width: int, columns: int) -> None:
        self.width, self.columns = width, columns
        self.copies = max(2, -(-L2_BYTES // (width * columns // 2)))
        words = torch.randint(-(2**31), 2**31, (width * columns // 8,), device="cuda", dtype=torch.int32)
        self.words = [words.clone() for _ in range(self.copies)]
        pair = torch.randn((columns // 128, width, 2), device="cuda").bfloat16() / 64
        self.pairs = [pair.clone() for _ in range(self.copies)]
        self.counters = int4.counters(width, "cuda")
        self.norm = torch.ones(columns, device="cuda").bfloat16()
        self.rows = torch.randn((128, columns), device="cuda").bfloat16()

    def tinygemm(self, copy: int, count: int) -> torch.Tensor:
        packed = self.words[copy].view(self.width // 8, self.columns // 128, 32, 4)
        return torch.ops.aten._weight_int4pack_mm(self.rows[:count], packed, 128, self.pairs[copy])  # type: ignore[no-any-return]

    def ours(self, copy: int, count: int, key: Key | None, early: int = 0) -> torch.Tensor:
        packed = self.words[copy].view(torch.int16).view(-1, self.width, key[0] if key else int4.plane(self.columns))
        return int4.multiply(
            self.rows[:count], packed, self.pairs[copy], self.counters, key[1:] if key else None, early
        )

    def after_norm(self, copy: int, count: int, early: int, norm_early: bool) -> torch.Tensor:
        rows = kernels.normalize(self.rows[:count], self.norm, 0.0, 1e-5, norm_early)
        packed = self.words[copy].view(torch.int16).view(-1, self.width, int4.plane(self.columns))
        return int4.multiply(rows, packed, self.pairs[copy], self.counters, None, early)

    def unpacked(self, copy: int, count: int) -> torch.Tensor:
        packed = self.words[copy].view(torch.int16).view(-1, self.width, int4.plane(self.columns))
        output = self.rows.new_empty((count, self.width))
        step = 2**24 // self.columns
        for begin in range(0, self.width, step):
            end = min(self.width, begin + step)
            output[:, begin:end] = self.rows[:count] @ int4.unpack(packed, self.pairs[copy], begin, end).T
        return output

    def graph(self, run: Any) -> tuple[torch.cuda.CUDAGraph, int]:
        """A recorded graph of one product for each copy, or of 20 in turns."""
        launches = max(20, self.copies)
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(launches):
                run(number % self.copies)
        return graph, launches


def timed(graphs: dict[Any, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[Any, float]:
    """µs of one product for each: the median of `rounds` rounds over all, after one that does not count."""
    marks: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {key: [] for key in graphs}
    for number in range(rounds + 1):
        for key, (graph, _) in graphs.items():
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            graph.replay()
            pair[1].record()
            if number:
                marks[key].append(pair)
    torch.cuda.synchronize()
    return {
        key: statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1000 / graphs[key][1]
        for key, pairs in marks.items()
    }


def check_early() -> str:
    """Whether a product that is begun early, in a chain of graphs' kernels, gives another result."""
    weights, results = Weights(4096, 4096), []
    for early, norm in ((0, False), (1, True), (2, True), (3, False), (3, True)):
        graph = torch.cuda.CUDAGraph()
        weights.after_norm(0, 5, early, norm)
        torch.cuda.synchronize()
        rows = weights.rows.clone()
        with torch.cuda.graph(graph):
            outputs = []
            for number in range(60):
                states = kernels.normalize(weights.rows[:5], weights.norm, 0.0, 1e-5, norm)
                packed = weights.words[number % weights.copies].view(torch.int16).view(-1, 4096, 64)
                outputs.append(int4.multiply(states, packed, weights.pairs[0], weights.counters, None, early))
                weights.rows[:5] = outputs[-1]
        weights.rows.copy_(rows)
        graph.replay()
        torch.cuda.synchronize()
        results.append(torch.stack(outputs))
        weights.rows.copy_(rows)
    return " ".join(str(torch.equal(results[0], other)) for other in results[1:])


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True)
@click.option("--seconds", default=70.0, show_default=True, help="No new shape is begun after these.")
def main(shapes: str, seconds: float) -> None:
    began = time.monotonic()
    cases = [(*tile, 8, shared) for tile in TILES for shared in (False, True)]
    cases += [(*tile, 16, shared) for tile in MANY_TILES for shared in (False, True)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context) as pool:
        list(pool.map(compile_one, cases))
    click.echo(f"{len(cases)} variants compiled at {time.monotonic() - began:.0f} s")
    wrong = {case: why for case in cases if (why := check(case))}
    for case, why in wrong.items():
        click.echo(f"WRONG plane, outputs, warps, stages, tokens, shared {case}: {why}")
    click.echo(f"{len(cases) - len(wrong)} of {len(cases)} variants are right, at {time.monotonic() - began:.0f} s")
    click.echo(f"begun early, the same results: {check_early()}")
    results: dict[str, Any] = {}
    for name in shapes.split(","):
        if time.monotonic() - began > seconds:
            click.echo(f"{name}: no time left")
            continue
        results[name] = one_shape(name, *SHAPES[name])
        click.echo(f"   at {time.monotonic() - began:.0f} s")
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    click.echo(json.dumps({"device": device, "torch": torch.__version__, "wrong": len(wrong), "us": results}))


def one_shape(name: str, width: int, columns: int) -> dict[str, Any]:
    weights = Weights(width, columns)
    floor = (width * columns / 2 + columns // 128 * width * 4) / 4e6
    click.echo(f"{name} {width} x {columns}: {floor:.1f} µs at 4 TB/s")
    best: dict[int, list[tuple[Key, float]]] = {}
    for count, tiles in ((1, TILES), (5, TILES), (16, MANY_TILES)):
        keys: list[Key] = [
            (plane, outputs, shares, warps, stages)
            for plane, outputs, warps, stages in tiles
            for shares in shares_of(width, columns, plane, outputs)
        ]
        graphs = {key: weights.graph(lambda copy, key=key, count=count: weights.ours(copy, count, key)) for key in keys}
        found = timed(graphs, ROUNDS)
        best[count] = sorted(found.items(), key=lambda item: item[1])
        shown = ", ".join(f"{'/'.join(map(str, key))} {us:.1f}" for key, us in best[count][:6])
        click.echo(f"  {count:2} tokens, plane/outputs/shares/warps/stages: {shown}; worst {best[count][-1][1]:.1f}")
    sums = {key: us + dict(best[5])[key] for key, us in best[1]}
    few, many = min(sums, key=lambda key: sums[key]), best[16][0][0]
    runs: dict[Any, Any] = {}
    for n in (1, 5, 16):
        runs["best", n] = weights.graph(lambda copy, n=n: weights.ours(copy, n, few if n <= 8 else many))
        for early in EARLY:
            runs[f"table, early {early}", n] = weights.graph(
                lambda copy, n=n, early=early: weights.ours(copy, n, None, early)
            )
    for n in (1, 5):
        for early, norm in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)):
            runs[f"norm({norm:d}) and product({early})", n] = weights.graph(
                lambda copy, n=n, early=early, norm=norm: weights.after_norm(copy, n, early, norm)
            )
    table = timed(runs, ROUNDS)
    for what in dict.fromkeys(who for who, _ in table):
        cells = [f"{n}: {us:.1f}" for (who, n), us in table.items() if who == what]
        if cells:
            click.echo(f"  {what:24} {'  '.join(cells)}")
    click.echo(f"   with {few} up to 8 tokens, {many} from 9 on")
    return {
        "best": {str(n): [["/".join(map(str, key)), round(us, 2)] for key, us in rows[:8]] for n, rows in best.items()},
        "few": few,
        "many": many,
        "table": {f"{who} {n}": round(us, 2) for (who, n), us in table.items()},
    }


if __name__ == "__main__":
    main()
