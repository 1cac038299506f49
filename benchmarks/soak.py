"""Minutes of requests of random lengths from several callers against one deployed policy: is any lost or mixed up?

A pool of prompts is cut from a text, of lengths up to the policy's longest, each with a number of its own at its start.
Every prompt is answered once alone, greedily. Then the callers ask for random ones of the pool, and every answer is
compared with the first, token for token. One that differs from its own and begins as another prompt's does is mixed up.
Any other difference is counted as differing: in bfloat16 a tie may tip another way where a cache was reused.

The footprint is witnessed as in a trial, by a thread beside the engine. Exit code 1 where a request was lost or mixed
up, or the budget was exceeded.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from autotune.config import mib
from autotune.policy.policy import Policy
from autotune.serve.deploy import LLM, deploy
from autotune.trial.witness import Witness

ALIKE = 16  # tokens in which two answers have to begin alike to be taken for the same: chosen
PATIENCE_S = 600  # a request still running this long after the end is lost


@dataclass
class Tally:
    """What came back. `differing` has the place of each first difference."""

    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    mixed_up: int = 0
    differing: list[int] = field(default_factory=list)
    rules: Counter[int] = field(default_factory=Counter)
    rates: list[float] = field(default_factory=list)

    def judge(self, number: int, answer: list[int], alone: list[list[int]]) -> None:
        """Compare the answer to prompt `number` with what every prompt was answered alone."""
        if answer == alone[number]:
            return
        agreed = [[*(a == b for a, b in zip(answer, other, strict=False)), False].index(False) for other in alone]
        if max(agreed) > agreed[number] and max(agreed) >= min(ALIKE, len(answer)):
            self.mixed_up += 1
        else:
            self.differing.append(agreed[number])


def pool(llm: LLM, text: str, count: int, chance: random.Random) -> list[list[int]]:
    """Prompts of random lengths, spread evenly over the powers of two; the first is of the longest."""
    longest = llm.policy.rules[-1].max_context_tokens
    tokens = llm.tokenizer(text, verbose=False)["input_ids"]
    lengths = [longest] + [min(longest, round(longest ** chance.uniform(0.5, 1))) for _ in range(count - 1)]
    prompts = []
    for number, length in enumerate(lengths):
        marker = llm.tokenizer(f"### request {number}\n\n")["input_ids"]
        at = chance.randrange(max(1, len(tokens) - length))
        prompts.append((marker + tokens[at : at + length])[:length])
    return prompts


def ask(llm: LLM, prompt: list[int]) -> Any:
    stream = llm.stream(prompt)
    for _ in stream:
        pass
    return stream.request


def soak(
    llm: LLM, prompts: list[list[int]], minutes: float, callers: int, seed: int, witness: Witness
) -> tuple[Tally, list[tuple[float, int]]]:
    """The tally, and every few seconds (seconds, highest footprint in bytes since the entry before)."""
    alone = [list(ask(llm, prompt).generation.tokens) for prompt in prompts]
    tally, lock = Tally(), threading.Lock()
    began = time.perf_counter()
    end = began + 60 * minutes

    def call(caller: int) -> None:
        chance = random.Random(f"{seed} {caller}")
        while time.perf_counter() < end:
            number = chance.randrange(len(prompts))
            try:
                request = ask(llm, prompts[number])
            except Exception as error:  # noqa: BLE001 - whatever it is, this request is lost
                with lock:
                    tally.lost.append(f"{len(prompts[number])} tokens: {type(error).__name__}: {error}")
                continue
            generation = request.generation
            with lock:
                tally.tokens += len(generation.tokens)
                tally.rules[request.rule.max_context_tokens] += 1
                tally.rates.append(len(generation.tokens) / (generation.ttft_s + generation.decode_s))
                tally.judge(number, list(generation.tokens), alone)

    threads = [threading.Thread(target=call, args=(caller,), daemon=True) for caller in range(callers)]
    footprints = []
    witness.begin()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and time.perf_counter() < end + PATIENCE_S:
        time.sleep(min(5.0, 60 * minutes / 12))
        footprints.append((time.perf_counter() - began, witness.peak))
        witness.begin()
        with lock:  # what came so far, for a soak that is cut off
            counts = f"{tally.rules.total()} answered, {len(tally.lost)} lost, {tally.mixed_up} mixed up"
            differing = f"{len(tally.differing)} differing"
        click.echo(f"[{footprints[-1][0]:5.0f} s] {counts}, {differing}, peak {mib(footprints[-1][1])}", err=True)
    tally.lost += ["it never came back"] * sum(thread.is_alive() for thread in threads)
    return tally, footprints


def start_witness(device: str) -> Witness:
    """To be begun before the model is loaded: NVML may only tell how much more the device holds since then."""
    uuid = None
    if device.startswith("cuda"):
        import torch

        torch.zeros(1, device=device)  # NVML lists a process once it has a context, which it then has to count
        uuid = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}"
    witness = Witness(os.getpid(), uuid)
    witness.start()
    return witness


@click.command(epilog="\b\nExample:\n  python -m benchmarks.soak policy.json --minutes 5 --callers 2")
@click.argument("policy", type=click.Path(exists=True, path_type=Path))
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True)
@click.option("--callers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="UTF-8 text. Default: the bundled pair's.")
@click.option("--prompts", "count", type=click.IntRange(min=1), default=16, show_default=True, help="In the pool.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(policy: Path, minutes: float, callers: int, text: Path | None, count: int, seed: int) -> None:
    """Ask a deployed policy for minutes on end, and compare every answer with the one given alone."""
    from autotune.demo import held_out_text

    witness = start_witness(str(Policy.load(policy).environment.get("device_word", "cpu")))
    llm = deploy(policy)
    prompts = pool(llm, text.read_text(encoding="utf-8") if text else held_out_text(), count, random.Random(seed))
    tally, footprints = soak(llm, prompts, minutes, callers, seed, witness)
    minute = min(60.0, 30 * minutes)
    budget, peak = llm.policy.budget_bytes, max(bytes_ for _, bytes_ in footprints)
    figures = {
        "minutes": minutes,
        "callers": callers,
        "requests": tally.rules.total(),
        "lost": len(tally.lost),
        "mixed_up": tally.mixed_up,
        "differing": len(tally.differing),
        "tokens_out": tally.tokens,
        "median_tokens_per_s": statistics.median(tally.rates) if tally.rates else None,
        "requests_per_rule": {str(limit): tally.rules[limit] for limit in sorted(tally.rules)},
        "longest_prompt_tokens": max(map(len, prompts)),
        "instrument": witness.instrument,
        "budget_bytes": budget,
        "peak_bytes": peak,
        "first_minute_peak_bytes": max(bytes_ for at, bytes_ in footprints if at <= minute or at == footprints[0][0]),
        "last_minute_peak_bytes": max(bytes_ for at, bytes_ in footprints if at > footprints[-1][0] - minute),
        "footprints": [[round(at, 1), bytes_] for at, bytes_ in footprints],
    }
    for name, value in figures.items():
        if name != "footprints":
            click.echo(f"{name.removesuffix('_bytes'):24} {mib(value) if name.endswith('_bytes') else value}")
    for reason in tally.lost[:5]:
        click.echo(f"lost: {reason}")
    if tally.differing:
        click.echo(f"differing from their tokens number {sorted(tally.differing)}")
    click.echo(json.dumps(figures))
    if tally.lost or tally.mixed_up or peak > budget:
        sys.exit(1)


if __name__ == "__main__":
    main()
