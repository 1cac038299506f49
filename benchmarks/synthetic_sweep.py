"""A sweep of an 8B model with a 1B draft on a GPU that never happened, for `search_regret.py`: rates by formula.

Footprints are the plan's, off by up to 3 % by weights, cache, launch and draft (each word its own error, by the seed),
so that a search has to learn them. A decode step takes the bytes that it reads over a bandwidth that depends on the
weights' kernels, and what launching takes; drafts are accepted less often the deeper they are; pairs of words
interact by 4 % at random. Rounds are 2 % apart. Loading takes 15 s, twice where a draft loads as well; a look 5 s or as
long as its two requests take, quality 2 s. Small caches lose quality, 2-bit ones and an nf4 head on int4 too much.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from autotune.config import MIB, Configuration, Record, Workload
from autotune.model.calibration import DEFAULT, predict
from autotune.model.folder import CONFIG
from autotune.model.shape import ModelShape, read_shape
from autotune.search.space import Space
from benchmarks.sweep import compact, configurations

# Rates, times and losses in this file are made up.
CONTEXTS = (128, 2048, 4096, 16384)  # tokens
NEW_TOKENS = 128
BASE_BYTES = 610 * MIB  # of a CUDA context, as in recorded/*/run.json
SHAPE = {  # of Llama-3-8B, as in rig.py
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
# of Llama-3.2-1B
DRAFT = SHAPE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": ("bf16", "quanto-int4", "bnb-nf4", "quanto-int8", "bnb-int8"),
    "lm_head": ("bf16", "nf4"),
    "embeddings": ("device", "host"),
    "attention": ("sdpa", "split_kv"),
    "draft": ("none", "prompt-lookup", "draft1"),
    "draft_weights": ("bf16", "quanto-int4"),
    "depth": (2, 4, 6),
    "cache": ("dynamic", "static", "quantized-4", "quantized-fp8", "quantized-2"),
    "prefill_chunk": (0, 2048),
    "launch": ("eager", "graph"),
}
# Bytes/s at which weights are read, seconds of attention a token of context, share of perplexity that is lost.
_BANDWIDTH = {"bf16": 2.4e12, "quanto-int4": 1.6e12, "bnb-nf4": 1.1e12, "quanto-int8": 1.5e12, "bnb-int8": 0.7e12}
_ATTENTION = {"dynamic": 4e-9, "static": 5e-9, "quantized-4": 9e-9, "quantized-fp8": 7e-9, "quantized-2": 10e-9}
_LOST = {"quantized-4": 0.008, "quantized-fp8": 0.002, "quantized-2": 0.12, "bnb-nf4": 0.02, "quanto-int4": 0.03}
_KNOBS = ("weights", "lm_head", "draft", "cache", "attention", "prefill_chunk", "launch")


def luck(seed: int, spread: float, *words: Any) -> float:
    """A factor that a machine has for some words: 1 for the seed 0, else drawn by it."""
    return math.exp(spread * random.Random(f"{seed} {words}").gauss(0, 1)) if seed else 1.0


def decode_s(c: Configuration, context: int, shapes: dict[str, ModelShape], seed: int) -> float:
    """Seconds a generated token takes."""
    said = predict(shapes["model"], shapes.get(c.draft), c, context, NEW_TOKENS, "cuda:0", DEFAULT["cuda"])
    launching = {"eager": 0.018, "graph": 0.0008}[c.launch] * luck(seed, 0.8, "launch", c.launch)
    attention = _ATTENTION[c.cache] * context * (0.4 if c.attention == "split_kv" else 1.0)
    attention *= luck(seed, 0.5, c.cache) * luck(seed, 0.5, c.attention)
    read = (said.owners["weights"] + said.owners["lm_head"]) / _BANDWIDTH[c.weights]
    step = read * luck(seed, 0.4, c.weights) * luck(seed, 0.1, c.lm_head) + launching + attention
    if c.embeddings == "host":
        step += 0.00005
    if not c.depth:
        return step
    accepted = min(0.9, (0.7 if c.has_draft_model else 0.35) * luck(seed, 0.25, c.draft))
    tokens = (1 - accepted ** (c.depth + 1)) / (1 - accepted)
    drafting = said.owners["draft"] / 1.2e12 + 0.4 * launching if c.has_draft_model else 0.00005
    return (step * (1 + 0.08 * c.depth) + c.depth * drafting) / tokens


def prefill_s(c: Configuration, context: int) -> float:
    slower = 1.3 if c.weights in ("bnb-nf4", "quanto-int4") else 1.0
    chunks = math.ceil(context / c.prefill_chunk) if c.prefill_chunk else 1
    return slower * context * 5e-5 + chunks * 0.01 + (context / 16384) ** 2 * (0.3 if c.prefill_chunk else 0.5)


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--every", default=1, show_default=True, help="hold every so many configurations, after the stock ones")
@click.option("--seed", default=0, show_default=True)
def main(path: Path, every: int, seed: int) -> None:
    """Write the sweep to PATH, as sweep.py does.

    Example: python -m benchmarks.synthetic_sweep sweep.jsonl --every 5
    """
    shapes = {}
    for name, config in (("model", SHAPE), ("draft1", DRAFT)):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(json.dumps(config))
            shapes[name] = read_shape(Path(folder))
    asked = configurations(Space(CHOICES), "bf16")
    held = [*asked[:3], *random.Random(seed).sample(asked[3:], (len(asked) - 3) // every)]
    header = {
        "note": "synthetic: nothing was measured",
        "workload": dataclasses.asdict(Workload(CONTEXTS, new_tokens=NEW_TOKENS)),
        "device": "cuda:0",
        "space": CHOICES,
        "space_name": "synthetic",
        "legal": len(asked),
        "environment": {"device": "none: synthetic", "full_precision": "bf16", "base_bytes": BASE_BYTES},
        "reference": {"took_s": 20.0},
        "shapes": {name: dataclasses.asdict(shape) for name, shape in shapes.items()},
    }
    with path.open("w") as file:
        file.write(json.dumps(header) + "\n")
        for configuration in sorted(held, key=lambda c: str(c.load_group)):
            for context in CONTEXTS:
                file.write(json.dumps(line(configuration, context, shapes, seed)) + "\n")
    click.echo(f"{len(held)} of {len(asked)} configurations at {len(CONTEXTS)} contexts")


def line(c: Configuration, context: int, shapes: dict[str, ModelShape], seed: int) -> dict[str, Any]:
    """One measurement of the sweep."""

    def draw(*words: Any) -> float:
        return random.Random(f"{seed} {words}").gauss(0, 1)

    said = predict(shapes["model"], shapes.get(c.draft), c, context, NEW_TOKENS, "cuda:0", DEFAULT["cuda"])
    words = [(knob, getattr(c, knob)) for knob in _KNOBS]
    off = sum(draw("footprint", c_word) for c_word in (c.weights, c.cache, c.launch, c.draft))
    body = said.total - said.owners["base"]
    peak = round(said.owners["base"] + body * (1 + min(max(0.015 * off, -0.03), 0.03)) * (1 + 0.001 * draw(c, context)))
    quirk = sum(0.04 * draw(*pair) for pair in combinations(words, 2)) / 2
    prefill = prefill_s(c, context)
    whole = (prefill + NEW_TOKENS * decode_s(c, context, shapes, seed)) * math.exp(quirk)
    rounds = [whole * (1 + 0.02 * draw(c, context, number)) for number in range(3)]
    share = prefill / (prefill + NEW_TOKENS * decode_s(c, context, shapes, seed))
    samples = tuple(
        {"round": number, "prompt": 0, "new_tokens": NEW_TOKENS, "ttft_s": share * seconds}
        | {"step_s": [(1 - share) * seconds], "proposed": 0, "accepted": 0, "verifications": 0}
        for number, seconds in enumerate(rounds)
    )
    lost = _LOST.get(c.cache, 0) + _LOST.get(c.weights, 0) + (0.004 if c.lm_head == "nf4" else 0)
    lost += 0.03 if c.lm_head == "nf4" and c.weights == "quanto-int4" and c.cache == "quantized-4" else 0
    record = Record(
        c,
        context,
        "quality_loss" if lost > 0.05 else "ok",
        "the text got worse" if lost > 0.05 else "",
        tokens_per_s=NEW_TOKENS / statistics.median(rounds),
        decode_tokens_per_s=(NEW_TOKENS - 1) / statistics.median((1 - share) * seconds for seconds in rounds),
        ttft_s=share * whole,
        peak_bytes=peak,
        base_bytes=BASE_BYTES,
        perplexity_ratio=1 + lost,
        samples=samples,
    )
    load = 30.0 if c.has_draft_model else 15.0
    took = max(5.0, sum(rounds) + whole)
    return {"record": compact(record), "took_s": load + took + 2.0, "load_s": load, "quality_s": 2.0} | {
        "load_peak_bytes": round(0.9 * (said.owners["base"] + said.owners["weights"] + said.owners["lm_head"]))
    }


if __name__ == "__main__":
    main()
