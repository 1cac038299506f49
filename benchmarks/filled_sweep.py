"""A recorded sweep's whole space, for `search_regret.py`: what was not measured is filled in from what was.

A sample of a space has few configurations to a load group, where a real run has hundreds, and a search can lose itself
in one. So every configuration of the space gets a record: its rate is what a Gaussian process learnt from the sweep
expects, times what pairs of words do together, by the seed (about 7 %); its footprint the plan's, corrected likewise;
its rounds vary as those of the nearest record at its context do. Nothing of that was measured, and the header says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np

from autotune.config import Configuration, LoadGroup, Record
from autotune.model.calibration import DEFAULT, predict
from autotune.search.pairs import with_idle
from autotune.search.space import Space
from autotune.search.surrogate import Belief, Pool, footprint_belief, rate_belief
from benchmarks.search_regret import Line, Sweep, read_sweep
from benchmarks.sweep import compact

_KNOBS = ("weights", "lm_head", "draft", "cache", "attention", "depth", "launch")
_QUIRK = 0.015  # standard deviation in ln(rate) of what two words do together: chosen; all 21 pairs make 7 %
_ERROR = 0.05  # standard deviation of a recorded ln(rate): chosen, above what its rounds vary by
# Of a look's time, of one at the longest context and of a load's, what one GPU takes where eight ran side by side:
# chosen after LOG.md's "The search on a recorded sweep of the 8B" (8 s a pair alone, 13 with eight).
_ALONE = 0.45, 0.9, 0.85


class Filled:
    """What is expected of every pair of the sweep's space."""

    def __init__(self, sweep: Sweep, seed: int):
        self.sweep, self.seed = sweep, seed
        space = Space({knob: tuple(words) for knob, words in sweep.header["space"].items()})
        self.configurations = list(dict.fromkeys([*with_idle(space.configurations()), *sweep.configurations]))
        self.pool = Pool(sweep.workload.contexts)
        self.pool.extend(self.configurations)
        self.rate = self._learnt(dataclasses.replace(rate_belief(), together=0.25))
        self.footprint = self._learnt(footprint_belief())
        self.known: dict[int, list[tuple[Configuration, Line]]] = {}
        for (configuration, context), line in sweep.lines.items():
            if (rate := line.record.tokens_per_s) is None:
                continue
            at = self.pool.index[configuration, context]
            self.rate.observe(at, math.log(rate), _ERROR)
            self.footprint.observe(
                at, math.log((line.record.peak_bytes or 0) / self._predicted(configuration, context))
            )
            self.known.setdefault(context, []).append((configuration, line))
        self.load_s: dict[tuple[str, bool], list[float]] = {}
        for group, seconds in sweep.load_s.items():
            self.load_s.setdefault(_kind(group), []).append(seconds)

    def _learnt(self, belief: Belief) -> Belief:
        belief.reset(self.pool, np.zeros(len(self.pool.pairs)))
        return belief

    def _predicted(self, configuration: Configuration, context: int) -> int:
        shapes, device = self.sweep.shapes, self.sweep.header["device"]
        draft, new_tokens = shapes.get(configuration.draft), self.sweep.workload.new_tokens
        calibration = DEFAULT[device.partition(":")[0]]
        return predict(shapes["model"], draft, configuration, context, new_tokens, device, calibration).total

    def line(self, configuration: Configuration, context: int) -> dict[str, Any]:
        """What a sweep wrote of the pair, or would have written."""
        if (recorded := self.sweep.lines.get((configuration, context))) is not None:
            return self._entry(recorded.record, recorded)
        done, at = configuration.at(context), self.pool.index[configuration, context]
        words = [(knob, getattr(done, knob)) for knob in _KNOBS]
        quirk = sum(random.Random(f"{self.seed} {context} {pair}").gauss(0, _QUIRK) for pair in combinations(words, 2))

        def unlike(item: tuple[Configuration, Line]) -> float:
            return sum(getattr(item[0], knob) != getattr(configuration, knob) for knob in (*_KNOBS, "prefill_chunk"))

        near = min(self.known[context], key=unlike)[1]
        same = [line.record for c, line in self.known[context] if c.at(context) == done]
        rate = (same[0].tokens_per_s if same else None) or math.exp(self.rate.mean[at] + quirk)
        slower = (near.record.tokens_per_s or rate) / rate
        samples = tuple(
            {**sample, "ttft_s": sample["ttft_s"] * slower, "step_s": [s * slower for s in sample["step_s"]]}
            for sample in near.record.samples
        )
        peak = round(self._predicted(configuration, context) * math.exp(self.footprint.mean[at]))
        record = Record(
            configuration,
            context,
            "ok",
            tokens_per_s=rate,
            decode_tokens_per_s=(near.record.decode_tokens_per_s or rate) / slower,
            ttft_s=(near.record.ttft_s or 0.0) * slower,
            peak_bytes=peak,
            base_bytes=near.record.base_bytes,
            perplexity_ratio=near.record.perplexity_ratio,
            samples=samples,
        )
        return self._entry(record, near)

    def _entry(self, record: Record, timed: Line) -> dict[str, Any]:
        group = record.configuration.load_group
        load = self.sweep.load_s.get(group) or statistics.fmean(self.load_s[_kind(group)])
        took = {"took_s": timed.measure_s + timed.quality_s + load, "load_s": load, "quality_s": timed.quality_s}
        return {"record": compact(record), **took, "load_peak_bytes": self.sweep.load_peak.get(group, 0)}


def _kind(group: LoadGroup) -> tuple[str, bool]:
    """Of load groups that take about as long to load."""
    return group.weights, group.draft != "none"


@click.command()
@click.argument("recorded", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seed", default=1, show_default=True)
@click.option("--alone", is_flag=True, help="Looks and loads as short as on a GPU of a machine that does nothing else.")
def main(recorded: Path, path: Path, seed: int, alone: bool) -> None:
    """Write to PATH the sweep RECORDED with the rest of its space filled in.

    Example: python -m benchmarks.filled_sweep benchmarks/recorded/sweep-8b-h200.jsonl.gz filled.jsonl --alone
    """
    sweep = read_sweep(recorded)
    filled, longest = Filled(sweep, seed), max(sweep.workload.contexts)
    header = sweep.header | {"note": "filled in: but for what it says it was made from, nothing was measured"}
    with path.open("w") as file:
        file.write(json.dumps(header | {"recorded": recorded.name}) + "\n")
        for configuration, context in filled.pool.pairs:
            entry = filled.line(configuration, context)
            if alone:
                look, load = _ALONE[context == longest], _ALONE[2]
                entry["took_s"] = (entry["took_s"] - entry["load_s"]) * look + entry["load_s"] * load
                entry |= {"quality_s": entry["quality_s"] * look, "load_s": entry["load_s"] * load}
            file.write(json.dumps(entry) + "\n")
    click.echo(f"{len(filled.configurations)} configurations, {len(sweep.configurations)} of them recorded")


if __name__ == "__main__":
    main()
