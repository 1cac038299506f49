"""Time the attention of a decode step over each kind of cache, on an NVIDIA GPU: `attention = split_kv`.

Example: python -m benchmarks.attention_speed --tokens 2048,16384

No model is needed: keys, values and queries are random, in the shape of the rig's 8B (32 heads, 8 KV heads, head_dim
128, bfloat16). Each kernel is first checked against attention in float64 over what its cache holds. Then, in replayed
CUDA graphs and with the cache in so many copies that the L2 cache does not serve them, each is timed in rounds over
all. Medians in µs of a layer, with the kernel that combines the parts.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click
import torch

from autotune.engine import attention, cache
from benchmarks.int4_speed import COPIES_BYTES, timed

HEADS, KV_HEADS, DIM = 32, 8, 128  # of Llama-3-8B, as in rig.py
COUNTS = (1, 5)  # query tokens: plain decoding, and the verification of a depth of 4
ROUNDS = 9  # timed replays, of which the median counts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


# The cache, and what is set in the kernels' module.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("static", {}),
    "fp8": ("quantized-fp8", {}),
    "4-bit": ("quantized-4", {}),
    "4-bit, as if long": ("quantized-4", {"LONG": 0}),
    "4-bit, as if short": ("quantized-4", {"LONG": 10**9}),
    "4-bit, no overlap": ("quantized-4", {"OVERLAP": False}),
}


def make_layer(word: str, tokens: int, count: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A layer that holds `tokens` random tokens and `count` new ones behind them; and all their keys and values."""
    torch.manual_seed(tokens + count)
    spread = torch.randn(1, KV_HEADS, 1, DIM, device=DEVICE).exp()
    keys = torch.randn(1, KV_HEADS, tokens + count, DIM, device=DEVICE) * spread + 2 * spread.flip(-1)
    values = torch.randn(1, KV_HEADS, tokens + count, DIM, device=DEVICE) + 0.5
    keys, values = (keys / spread.square().mean().sqrt()).to(DTYPE), values.to(DTYPE)
    if word == "static":
        layer: Any = cache.StaticLayer(tokens + 32, 32)
    elif word == "quantized-fp8":
        layer = cache.Float8Layer(tokens + 32, 32)
    else:
        layer = cache.QuantizedLayer(tokens + 32, 4, 32)
    layer.update(keys[:, :, :tokens], values[:, :, :tokens])
    stored = 0
    if word != "static":
        layer.settle()
        stored = layer.stored
    at = {"device": DEVICE, "dtype": torch.int64}
    layer.lengths = cache.Lengths(torch.tensor([tokens], **at), torch.tensor([stored], **at), False)
    recent = tokens - stored
    layer.keys[:, :, recent : recent + count] = keys[:, :, tokens:]
    layer.values[:, :, recent : recent + count] = values[:, :, tokens:]
    return layer, keys, values


def make_query(count: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn((1, count, HEADS, DIM), generator=generator, device=DEVICE).to(DTYPE).transpose(1, 2)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[1, count, heads, head_dim] in float64."""
    count, held = query.shape[2], keys.shape[2] - query.shape[2]
    keys, values = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * DIM**-0.5
    later = torch.arange(held + count, device=DEVICE) > held + torch.arange(count, device=DEVICE)[:, None]
    return (scores.masked_fill(later, -torch.inf).softmax(3) @ values).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def run(name: str, query: torch.Tensor, layer: Any) -> torch.Tensor:
    _, settings = VARIANTS[name]
    kept = {key: getattr(attention, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(attention, key, value)
        return attention.decode_attention(query, layer)  # type: ignore[no-any-return]
    finally:
        for key, value in kept.items():
            setattr(attention, key, value)


def check(name: str, tokens: int, count: int) -> tuple[float, float]:
    """The error of the kernel, and with that of what the cache stores."""
    word, _ = VARIANTS[name]
    layer, keys, values = make_layer(word, tokens, count)
    query = make_query(count)
    found = run(name, query, layer)
    again = run(name, query, layer)
    if not torch.equal(found, again):
        raise ValueError("two runs differ")
    if word == "static":
        read = keys, values
    else:
        window = (states[:, :, layer.stored :].float() for states in (keys, values))
        read = layer.read(*window, layer.stored)
    return error(found, exact(query, *read)), error(found, exact(query, keys, values))


def compile_one(name: str, count: int) -> str:
    """One variant into Triton's cache on disk, by running it."""
    try:
        word, _ = VARIANTS[name]
        for tokens in (304, attention.LONG + 304):  # 4-bit caches of these lengths have a kernel each
            run(name, make_query(count), make_layer(word, tokens, count)[0])
        torch.cuda.synchronize()
    except Exception as failure:  # noqa: BLE001 - whatever fails, the others are timed
        return (str(failure).strip().splitlines() or [repr(failure)])[-1][:200]
    return ""


def copied(layer: Any) -> Any:
    twin = copy.copy(layer)
    for key, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(twin, key, value.clone())
    return twin


def layer_bytes(layer: Any) -> int:
    return sum(value.nbytes for value in vars(layer).values() if isinstance(value, torch.Tensor))


def graph(name: str, query: torch.Tensor, layers: list[Any]) -> tuple[torch.cuda.CUDAGraph, int]:
    launches = max(24, len(layers))
    run(name, query, layers[0])
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for number in range(launches):
            run(name, query, layers[number % len(layers)])
    return recorded, launches


def one_case(names: list[str], tokens: int, count: int) -> dict[str, float]:
    sets: dict[str, list[Any]] = {}
    graphs = {}
    query = make_query(count)
    for name in names:
        word, _ = VARIANTS[name]
        if word not in sets:
            layer = make_layer(word, tokens, count)[0]
            sets[word] = [layer] + [copied(layer) for _ in range(COPIES_BYTES // layer_bytes(layer))]
        graphs[name] = graph(name, query, sets[word])
    return timed(graphs, ROUNDS)


@click.command(help=__doc__)
@click.option("--tokens", default="2048,4096,16384", show_default=True)
@click.option("--only-check", is_flag=True, help="On any device, with one short cache.")
def main(tokens: str, only_check: bool) -> None:
    began = time.monotonic()
    lengths = [int(word) for word in tokens.split(",")]
    names, failed = list(VARIANTS), {}
    if not only_check:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context) as pool:
            jobs = {(name, n): pool.submit(compile_one, name, n) for name in names for n in COUNTS}
            for (name, n), job in jobs.items():
                if why := job.result():
                    failed[name] = why
                    click.echo(f"{name}, {n} tokens: {why}")
        click.echo(f"compiled at {time.monotonic() - began:.0f} s")
    errors = {}
    for name in names:
        if name in failed:
            continue
        try:
            cases = [(n, count) for n in ([304] if only_check else [32, 304, lengths[-1]]) for count in COUNTS]
            found = [check(name, *case) for case in cases]
        except Exception as failure:  # noqa: BLE001 - whatever fails, the others are timed
            failed[name] = (str(failure).strip().splitlines() or [repr(failure)])[-1][:200]
            click.echo(f"{name}: {failed[name]}")
            continue
        errors[name] = [max(pair[0] for pair in found), found[-1][1]]
        click.echo(f"{name:20} error {errors[name][0]:.5f}, with that of the cache {errors[name][1]:.5f}")
        if not errors[name][0] < 0.01:
            failed[name] = "wrong"
    names = [name for name in names if name not in failed]
    table = {}
    if not only_check:
        click.echo(f"checked at {time.monotonic() - began:.0f} s")
        for length in lengths:
            for count in COUNTS:
                table[f"{length}, {count}"] = one_case(names, length, count)
                torch.cuda.empty_cache()
        click.echo(" " * 22 + "".join(f"{case:>12}" for case in table))
        for name in names:
            click.echo(f"{name:22}" + "".join(f"{us[name]:12.1f}" for us in table.values()))
        click.echo(f"in {time.monotonic() - began:.0f} s")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    click.echo(
        json.dumps({"device": device, "torch": torch.__version__, "failed": failed, "errors": errors, "us": table})
    )


if __name__ == "__main__":
    main()
