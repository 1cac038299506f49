"""Sweeps and their replay. The sweep here is synthetic, made from a formula; only the last test measures anything."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from autotune.config import MIB, Configuration, Record, Workload
from autotune.model.calibration import DEFAULT, predict
from autotune.search.space import Space
from benchmarks import filled_sweep
from benchmarks import search_regret as regret
from benchmarks import sweep as sweeping
from tests.records import synthetic_record
from tests.shapes import LLAMA_1B, LLAMA_8B, shape_of

CONTEXTS = (128, 2048)
RECORDED = Path(__file__).parents[2] / "benchmarks" / "recorded"
QUICK = {"bf16": 60.0, "bnb-nf4": 80.0, "quanto-int4": 100.0}
CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": ("bf16", "bnb-nf4", "quanto-int4"),
    "lm_head": ("bf16", "nf4"),
    "embeddings": ("device",),
    "attention": ("sdpa",),
    "draft": ("none", "prompt-lookup", "draft1"),
    "draft_weights": ("bf16",),
    "depth": (2, 4),
    "cache": ("dynamic", "static", "quantized-4"),
    "prefill_chunk": (0, 512),
    "launch": ("eager", "graph"),
}


def rate(c: Configuration, context: int) -> float:
    speed = QUICK[c.weights] * {"dynamic": 1.0, "static": 1.3, "quantized-4": 0.9}[c.cache]
    speed *= {"none": 1.0, "prompt-lookup": 1.1, "draft1": 1.2}[c.draft] if c.depth else 1.0
    speed *= (1.5 if c.launch == "graph" else 1.0) * (1.05 if c.lm_head == "nf4" else 1.0)
    return speed / (1 + context / 4096) * (0.9 if c.depth == 2 else 1.0)


def synthetic_sweep(folder: Path, share: int = 1) -> regret.Sweep:
    """Every `share`-th configuration of CHOICES, by formula: rounds 2 % apart, footprints as planned, 5 s a load."""
    shapes = {"model": shape_of(folder, LLAMA_8B), "draft1": shape_of(folder, LLAMA_1B)}
    asked = sweeping.configurations(Space(CHOICES), "bf16")
    stock, rest = asked[:3], asked[3:]
    found = []
    for configuration in [*stock, *rest[::share]]:
        for context in CONTEXTS:
            said = predict(
                shapes["model"],
                shapes.get(configuration.draft),
                configuration,
                context,
                16,
                "cuda:0",
                DEFAULT["cuda"],
            )
            middle = rate(configuration, context)
            record = synthetic_record(
                configuration,
                context,
                (0.98 * middle, middle, 1.02 * middle),
                peak=said.total,
                ttft_s=0.01,
                base_bytes=610 * MIB,
            )
            line = {"record": sweeping.compact(record), "took_s": 9.0, "load_s": 5.0, "quality_s": 1.0}
            found.append({**line, "load_peak_bytes": 0})
    header = {
        "note": "synthetic",
        "workload": dataclasses.asdict(Workload(CONTEXTS, new_tokens=16)),
        "device": "cuda:0",
        "space": CHOICES,
        "space_name": "synthetic",
        "legal": len(asked),
        "environment": {"device": "none: synthetic", "full_precision": "bf16", "base_bytes": 610 * MIB},
        "reference": {"took_s": 5.0},
        "shapes": {name: dataclasses.asdict(shape) for name, shape in shapes.items()},
    }
    return regret.sweep_of(*json.loads(json.dumps([header, found])))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> regret.Sweep:
    return synthetic_sweep(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> regret.Sweep:
    return synthetic_sweep(tmp_path_factory.mktemp("shapes"), share=5)


BF16, NF4 = Configuration(), Configuration(weights="bnb-nf4")


def test_a_replayed_measurement_takes_its_recorded_time_its_load_and_its_quality_once(synthetic: regret.Sweep) -> None:
    replay = regret.Replay(synthetic, regret.UNLIMITED, 1000.0)
    steps = [(BF16, 128, 9.0), (BF16, 128, 3.0), (BF16, 2048, 4.0), (NF4, 128, 9.0), (BF16, 2048, 8.0)]
    for configuration, context, seconds in steps:
        before = replay.now
        record = replay.measure(configuration, context)
        assert (record.outcome, replay.now - before) == ("ok", seconds)
    assert replay.loads == 3
    everything = synthetic.lines[BF16.replace(cache="static"), 128]
    assert (everything.measure_s, everything.quality_s) == (3.0, 1.0)
    pairs = len(synthetic.lines)
    groups = {configuration.load_group for configuration, _ in synthetic.lines}
    scored = {(configuration.quality_key, context) for configuration, context in synthetic.lines}
    assert synthetic.cost_s == 3.0 * pairs + 5.0 * len(groups) + 1.0 * len(scored)


def test_what_held_more_than_the_budget_is_out_of_memory_without_figures(synthetic: regret.Sweep) -> None:
    peak = synthetic.lines[BF16, 2048].record.peak_bytes or 0
    fits = regret.Replay(synthetic, peak, 1000.0)
    assert fits.measure(BF16, 2048).outcome == "ok"
    replay = regret.Replay(synthetic, peak - 1, 1000.0)
    record = replay.measure(BF16, 2048)
    assert (record.outcome, record.peak_bytes, record.tokens_per_s) == ("out_of_memory", None, None)
    assert (replay.now, replay.resident) == (8.0, BF16.load_group)  # no quality was measured; the load stays


def test_a_load_group_that_does_not_fit_while_loading_is_tried_once(synthetic: regret.Sweep) -> None:
    peaks = {**synthetic.load_peak, BF16.load_group: 10**13}
    replay = regret.Replay(dataclasses.replace(synthetic, load_peak=peaks), 10**12, 1000.0)
    first, second = replay.measure(BF16, 128), replay.measure(BF16.replace(cache="static"), 128)
    assert first.reason.startswith("while loading")
    assert second.reason == first.reason
    assert (replay.now, replay.loads, replay.resident) == (5.0, 1, None)


def test_a_failure_comes_back_as_it_was_recorded(synthetic: regret.Sweep) -> None:
    failed = Record(NF4, 128, "crashed", "the worker was killed", measure_s=3.0)
    sweep = dataclasses.replace(synthetic, lines={**synthetic.lines, (NF4, 128): regret.Line(failed, 3.0, 1.0)})
    replay = regret.Replay(sweep, regret.UNLIMITED, 1000.0)
    record = replay.measure(NF4, 128)
    assert (record.outcome, record.reason, replay.now, replay.resident) == (failed.outcome, failed.reason, 8.0, None)


def test_a_measurement_that_would_end_too_late_does_not_happen(synthetic: regret.Sweep) -> None:
    replay = regret.Replay(synthetic, regret.UNLIMITED, 10.0)
    replay.measure(BF16, 128)
    with pytest.raises(regret.OutOfTime):
        replay.measure(BF16, 2048)
    assert (replay.now, len(replay.records), replay.loads) == (9.0, 1, 1)
    record = regret.Replay(synthetic, regret.UNLIMITED, 10.0).measure(BF16, 128, timeout_s=2.0)
    assert (record.outcome, record.tokens_per_s) == ("timeout", None)


def test_rounds_are_drawn_from_the_recorded_ones_by_the_seed(synthetic: regret.Sweep) -> None:
    def drawn(seed: int) -> list[list[float]]:
        replay = regret.Replay(synthetic, regret.UNLIMITED, 1000.0, seed)
        return [replay.measure(BF16, 128).round_rates("end-to-end") for _ in range(4)]

    recorded = synthetic.lines[BF16, 128].record.round_rates("end-to-end")
    assert drawn(1) == drawn(1) != drawn(2)
    assert {value for rates in drawn(1) + drawn(2) for value in rates} == set(recorded)
    assert all(len(rates) == 3 for rates in drawn(1))
    assert len({tuple(rates) for rates in drawn(1)}) > 1


def test_far_below_the_bar_one_round_is_paid(synthetic: regret.Sweep) -> None:
    full, short = (regret.Replay(synthetic, regret.UNLIMITED, 1000.0) for _ in range(2))
    full.measure(BF16, 128, bar=1.2 * rate(BF16, 128))
    record = short.measure(BF16, 128, bar=2 * rate(BF16, 128))
    assert len(full.records[0].round_rates("end-to-end")) == 3
    assert len(record.round_rates("end-to-end")) == 1
    spared = 2 * 100 / rate(BF16, 128)
    assert full.now - short.now == pytest.approx(spared, rel=0.03)


def test_the_optimum_is_one_load_for_all_contexts_and_fits(synthetic: regret.Sweep) -> None:
    best = Configuration(
        weights="quanto-int4",
        lm_head="nf4",
        draft="draft1",
        draft_weights="bf16",
        depth=4,
        cache="static",
        launch="graph",
    )
    assert synthetic.optimum(regret.UNLIMITED) == pytest.approx({c: rate(best, c) for c in CONTEXTS}, rel=1e-5)
    peaks = [synthetic.lines[best.replace(prefill_chunk=chunk), 2048].record.peak_bytes or 0 for chunk in (0, 512)]
    without = synthetic.optimum(min(peaks) - 1)
    assert without[2048] < rate(best, 2048)
    budgets = synthetic.budgets()
    assert budgets == sorted(budgets, reverse=True)
    assert set(synthetic.optimum(budgets[-1])) == set(CONTEXTS)
    assert 0 < len(synthetic.feasible(budgets[-1])) < len(synthetic.lines) / 10
    assert len(synthetic.optimum(int(budgets[-1] / 1.01))) < len(CONTEXTS)


def test_a_context_that_another_load_serves_faster_is_no_optimum_of_one_load(synthetic: regret.Sweep) -> None:
    rates = {(BF16, 128): 150.0, (BF16, 2048): 50.0, (NF4, 128): 100.0, (NF4, 2048): 100.0}
    lines = {pair: regret.Line(synthetic_record(*pair, (value,) * 3), 1.0, 0.0) for pair, value in rates.items()}
    sweep = regret.Sweep(synthetic.header, lines, {}, {})
    assert sweep.optimum(regret.UNLIMITED) == {128: 100.0, 2048: 100.0}
    figures = regret.judged(sweep, regret.UNLIMITED, {128: BF16, 2048: BF16}, regret.Replay(synthetic, 1, 1.0))
    assert figures["scores"] == {"128": 1.5, "2048": 0.5}
    assert figures["policy"] == 0.866


def test_the_search_is_the_same_by_seed_keeps_its_time_and_finds_the_optimum(synthetic: regret.Sweep) -> None:
    budget, limit = synthetic.budgets()[1], 0.07 * synthetic.cost_s
    (chosen, replay), again = (regret.search(synthetic, budget, 3, limit) for _ in range(2))
    assert (chosen, replay.records) == (again[0], again[1].records)
    assert 0.5 * limit < replay.now <= limit
    figures = regret.judged(synthetic, budget, chosen, replay)
    assert min(figures["scores"].values()) > 0.9
    assert figures["infeasible_recommendations"] == 0
    assert {record.stage for record in replay.records} == {"baseline", "search"}
    looks = Counter((record.configuration, record.context_tokens) for record in replay.records)
    assert max(looks.values()) <= 3
    assert sum(looks.values()) - len(looks) <= 0.1 * len(looks)  # second looks are few


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_the_cost_finds_the_optimum_of_the_recorded_sweep(seed: int) -> None:
    sweep, budget = regret.read_sweep(RECORDED / "sweep-8b-h200.jsonl.gz"), 24 * 10**9
    chosen, replay = regret.search(sweep, budget, seed, 0.1 * sweep.cost_s)
    assert regret.judged(sweep, budget, chosen, replay)["policy"] > 0.98


def test_a_filled_sweep_holds_the_whole_space_and_what_was_recorded_as_it_was(tmp_path: Path) -> None:
    recorded, path = RECORDED / "sweep-8b-h200.jsonl.gz", tmp_path / "filled.jsonl"
    done = CliRunner().invoke(filled_sweep.main, [str(recorded), str(path), "--alone"])
    assert done.exit_code == 0, done.output
    sweep, whole = regret.read_sweep(recorded), regret.read_sweep(path)
    assert set(whole.space.configurations()) >= set(Space(whole.space.choices).configurations())
    assert len(whole.lines) == 675 * 4
    for pair, line in sweep.lines.items():
        assert whole.lines[pair].record.samples == line.record.samples
        assert whole.lines[pair].measure_s < line.measure_s
    rates = [line.record.tokens_per_s or 0 for line in sweep.lines.values()]
    assert all(0.5 * min(rates) < (line.record.tokens_per_s or 0) < 2 * max(rates) for line in whole.lines.values())
    chosen, replay = regret.search(whole, 12 * 10**9, 0, 230)  # as long as a run of seven minutes searches
    assert regret.judged(whole, 12 * 10**9, chosen, replay)["policy"] > 0.9


def test_an_earlier_run_under_another_budget_makes_a_search_quicker(synthetic: regret.Sweep, tmp_path: Path) -> None:
    regret.write_earlier(synthetic, tmp_path / "earlier", 0)
    budget, limit = synthetic.budgets()[1], 0.02 * synthetic.cost_s
    policies = []
    for beside in (None, tmp_path):
        chosen, replay = regret.search(synthetic, budget, 0, limit, beside)
        figures = regret.judged(synthetic, budget, chosen, replay)
        assert figures["infeasible_recommendations"] == 0
        assert {(c, context) for context, c in chosen.items()} <= {
            (record.configuration, record.context_tokens) for record in replay.records
        }
        policies.append(figures["policy"])
    assert policies[0] < 0.97 < policies[1]


@pytest.mark.parametrize("method", regret.BASELINES)
def test_the_other_methods_keep_to_each_share_and_measure_nothing_twice(method: str, synthetic: regret.Sweep) -> None:
    if method == "GP":
        pytest.importorskip("scipy")
    budget, limits = synthetic.budgets()[1], [share * synthetic.cost_s for share in (0.02, 0.05)]
    seen = []
    for limit, (chosen, replay) in zip(limits, regret.baseline(method, synthetic, budget, 1, limits), strict=True):
        pairs = [(record.configuration, record.context_tokens) for record in replay.records]
        assert 0.7 * limit < replay.now <= limit
        assert len(set(pairs)) == len(pairs)
        assert {(configuration, context) for context, configuration in chosen.items()} <= set(pairs)
        seen.append(len(pairs))
    assert seen[0] < seen[1]


def test_hill_climbing_climbs(synthetic: regret.Sweep) -> None:
    proposals, scores = regret.climb(synthetic, 0), []
    asked = next(proposals)
    for _ in range(60):
        records = [synthetic.lines[asked, context].record for context in CONTEXTS]
        scores.append(regret.score(synthetic, records) or 0)
        asked = proposals.send(records)
    top = math.prod(synthetic.optimum(regret.UNLIMITED).values()) ** 0.5
    assert max(scores) == pytest.approx(top)


def test_a_sweep_of_a_part_answers_with_the_nearest_that_it_holds(part: regret.Sweep, synthetic: regret.Sweep) -> None:
    held = set(part.configurations)
    assert len(held) < len(synthetic.configurations) / 4
    assert all(part.space.nearest(configuration) == configuration for configuration in part.space.held)
    for configuration in synthetic.space.held:
        found = part.space.nearest(configuration)
        assert found in held
        if any(other.load_group == configuration.load_group for other in part.space.held):
            assert found.load_group == configuration.load_group
    assert part.space.idle
    assert set(part.space.configurations()) == {*part.space.held, *part.space.idle} == held
    assert part.cost_s < synthetic.cost_s / 3
    chosen, replay = regret.search(part, regret.UNLIMITED, 0, 0.2 * part.cost_s)
    assert {record.configuration for record in replay.records} <= held
    assert regret.judged(part, regret.UNLIMITED, chosen, replay)["policy"] > 0.9


def test_a_choice_that_does_not_fit_scores_nothing_and_is_counted(synthetic: regret.Sweep) -> None:
    peak = synthetic.lines[BF16, 128].record.peak_bytes or 0
    replay = regret.Replay(synthetic, peak, 1000.0)
    replay.measure(BF16, 2048)
    figures = regret.judged(synthetic, peak, {128: BF16, 2048: BF16}, replay)
    best = synthetic.optimum(peak)
    assert figures["scores"] == {"128": round(rate(BF16, 128) / best[128], 4), "2048": 0.0}
    assert (figures["infeasible_recommendations"], figures["infeasible"], figures["policy"]) == (1, 1, 0.0)


def row(method: str, policy: float, share: float = 0.1, **figures: Any) -> dict[str, Any]:
    row = {"method": method, "budget_bytes": 1, "seed": 0, "share": share, "scores": {"64": policy}, "policy": policy}
    row |= {"measured": 10, "infeasible": 1, "infeasible_recommendations": 0, "loads": 1, "cost": 0.1, "own_s": 1.0}
    return row | figures


def test_bars_are_held_and_missed() -> None:
    def held(*rows: dict[str, Any]) -> list[bool]:
        return list(regret.bars(list(rows), (0.1,), [1]).values())

    assert regret.quantile([float(value) for value in range(20)], 0.1) == 1.0
    good = [row("autotune", 0.99) for _ in range(18)] + [row("autotune", 0.96), row("autotune", 0.5)]
    assert held(*good, row("random", 0.9)) == [True, True, True, True, True]
    assert held(*good, row("random", 1.0)) == [True, True, True, True, False]
    assert held(*good, *[row("autotune", 0.5)] * 2, row("random", 0.9)) == [True, True, True, False, True]
    assert held(row("autotune", 0.99), row("random", 0.99)) == [True, True, True, True, False]
    assert held(row("autotune", 0.97), row("random", 0.9)) == [True, True, False, True, True]
    assert held(row("autotune", 0.99, infeasible=2), row("random", 0.9)) == [True, False, True, True, True]
    assert held(row("autotune", 0.99, infeasible_recommendations=1))[0] is False


def test_the_groups_of_a_sweep_stay_together_and_a_sample_is_drawn_by_the_seed() -> None:
    asked = sweeping.configurations(Space(CHOICES), "bf16")
    idle = [configuration for configuration in asked if configuration.has_draft_model and not configuration.depth]
    assert idle
    assert len(set(asked)) == len(asked)
    whole = sweeping.by_group(asked, 3, None, None, 0)
    assert set(whole) == set(asked)
    groups = [configuration.load_group for configuration in whole]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == len(set(groups)) - 1
    assert sweeping.by_group(asked, 3, None, None, 1) != whole
    drawn = sweeping.by_group(asked, 3, 20, 4, 0)
    assert drawn == sweeping.by_group(asked, 3, 20, 4, 0) != sweeping.by_group(asked, 3, 20, 4, 1)
    assert len(drawn) == 23
    assert set(asked[:3]) <= set(drawn)
    assert len({c.load_group for c in drawn} - {c.load_group for c in asked[:3]}) <= 4


def test_the_parts_of_a_sweep_are_whole_load_groups_and_all_of_it() -> None:
    order = sweeping.by_group(sweeping.configurations(Space(CHOICES), "bf16"), 3, 60, None, 0)
    parts = [sweeping.part(order, number, 3) for number in (1, 2, 3)]
    assert sorted(map(repr, itertools.chain(*parts))) == sorted(map(repr, order))
    groups = [{c.load_group for c in part} for part in parts]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    largest = max(sum(c.load_group == group for c in order) for group in set.union(*groups))
    assert max(map(len, parts)) - min(map(len, parts)) <= largest
    assert sweeping._shard("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "1", "a/b", "1/"):
        with pytest.raises(click.UsageError, match=f"--shard {wrong}: give a part's number"):
            sweeping._shard(wrong)


def test_parts_of_one_sweep_are_joined_and_of_another_refused(tmp_path: Path) -> None:
    def written(shard: str, lines: int, **other: Any) -> Path:
        path = tmp_path / f"{shard[0]}-{len(other)}.jsonl"
        header = {**dict.fromkeys(sweeping.IDENTITY, 0), "workload": {"contexts": [64]}, "legal": 9, "chosen": 2}
        header |= {"shard": shard, "device": f"cuda:{shard[0]}", **other}
        record = sweeping.compact(Record(Configuration(depth=len(other)), 64, "ok"))
        path.write_text("".join(json.dumps(line) + "\n" for line in [header, *[{"record": record}] * lines]))
        return path

    first, second = written("1/2", 2), written("2/2", 1)
    figures = sweeping.join([first, second], tmp_path / "all.jsonl")
    assert (figures["pairs"], figures["measured"], figures["finished"]) == (4, 3, False)
    header, *lines = gzip.decompress((tmp_path / "all.jsonl.gz").read_bytes()).decode().splitlines()
    assert json.loads(header)["chosen"] == 4
    assert len(lines) == 3
    assert sweeping.join([first, written("2/2", 2)], tmp_path / "whole.jsonl")["finished"]
    with pytest.raises(click.UsageError, match="the same part twice"):
        sweeping.join([first, first], tmp_path / "twice.jsonl")
    with pytest.raises(click.UsageError, match="another seed"):
        sweeping.join([first, written("2/2", 2, seed=1)], tmp_path / "other.jsonl")


def test_what_a_sweep_keeps_of_a_record_has_the_same_rates_and_nothing_more() -> None:
    configuration = Configuration(weights="bnb-nf4", draft="draft1", draft_weights="bf16", depth=4)
    whole = synthetic_record(configuration, 64, machine={"before": {}}, quality={"windows": [1.0]})
    kept = Record.from_json(json.loads(json.dumps(sweeping.compact(whole))))
    assert kept.configuration == configuration
    for objective in ("end-to-end", "decode", "ttft"):
        assert kept.round_rates(objective) == pytest.approx(whole.round_rates(objective), rel=1e-5)
    assert (kept.tokens_per_s, kept.peak_bytes, kept.machine, kept.quality) == (100.0, whole.peak_bytes, {}, {})
    assert all(len(sample["step_s"]) == 1 for sample in kept.samples)
    assert Record.from_json(sweeping.compact(Record(Configuration(), 64, "crashed", "gone"))).reason == "gone"


def test_a_sweep_continues_without_the_line_that_was_cut_off_and_refuses_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.jsonl"
    header = dict.fromkeys(sweeping.IDENTITY, 0)
    assert sweeping.resume(path, header) == []
    with path.open("a") as file:
        sweeping.append(file, {"took_s": 1.0})
        file.write('{"took_s": 2')
    assert sweeping.resume(path, header) == [{"took_s": 1.0}]
    assert path.read_text().endswith("1.0}\n")
    with pytest.raises(click.UsageError, match="another workload, seed: give this one a file of its own with --out"):
        sweeping.resume(path, {**header, "workload": 1, "seed": 1})
    text = path.read_bytes()
    packed = sweeping.compress(path)
    assert gzip.decompress(packed.read_bytes()) == text
    assert not path.exists()


SPACE = """
[draft]
choices = ["none", "model"]
[depth]
choices = [2]
[cache]
choices = ["dynamic", "static"]
"""


def test_the_bundled_pair_is_swept_in_two_goes_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.trial.trials._unsteady", lambda figures, drift: "")  # however busy this machine is
    (tmp_path / "space.toml").write_text(SPACE)
    out, packed = tmp_path / "sweep.jsonl", tmp_path / "sweep.jsonl.gz"
    options = ["--space", str(tmp_path / "space.toml"), "--contexts", "64", "--new-tokens", "4", "--out", str(out)]

    def done(command: click.Command, *words: str) -> dict[str, Any]:
        finished = CliRunner().invoke(command, words, catch_exceptions=False)
        assert finished.exit_code == 0, finished.output
        return json.loads(finished.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    first = done(sweeping.main, *options, "--timeout", "1")
    assert (first["measured"], first["finished"]) == (0, False)
    assert len(out.read_text().splitlines()) == 1
    second = done(sweeping.main, *options)
    assert (second["pairs"], second["measured"], second["finished"]) == (8, 8, True)
    sweep = regret.read_sweep(packed)
    loaded = {c.load_group for c in sweep.configurations}
    assert all(sweep.load_s[group] > 0.5 for group in loaded)
    assert {c.draft for c in sweep.configurations} == {"none", "draft1"}
    assert str(tmp_path) not in gzip.decompress(packed.read_bytes()).decode()
    asked = ["--seeds", "1", "--shares", "0.9", "--methods", "autotune,random"]
    figures = done(regret.main, str(packed), *asked)
    assert (figures["held"], figures["legal"]) == (8, 8)
    assert {row["method"] for row in figures["rows"]} == {"autotune", "random"}
    assert all(row["infeasible_recommendations"] == 0 for row in figures["rows"])
