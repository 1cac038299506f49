"""The report: drawn from stored results only, one file, offline, and safe against what the results contain."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import MIB, Budget, Configuration, LoadGroup, Record, Workload
from autotune.policy.compare import speedup
from autotune.report.figures import pareto_front
from autotune.report.page import write_report
from autotune.report.view import RunData, describe
from tests.records import synthetic_record as measured

BASELINE = Configuration(weights="bnb-nf4")
BUDGET = 8600 * MIB
WEIGHTS_MIB = {"bf16": 14300, "bnb-int8": 6600, "bnb-nf4": 4100, "quanto-int4": 4250}
SPEED = {"bf16": 32.0, "bnb-int8": 9.0, "bnb-nf4": 31.0, "quanto-int4": 26.0}
LOSS = {"bf16": 0.0, "bnb-int8": 0.3, "bnb-nf4": 2.1, "quanto-int4": 2.6}
CACHE_LOSS = {"quantized-8": 0.05, "quantized-4": 0.9, "quantized-2": 38.0}
CACHE_BITS = {"quantized-8": 8.5, "quantized-4": 4.5, "quantized-2": 2.5}


def synthetic_load(dice: random.Random) -> LoadGroup:
    draft = dice.choice(["none", "/models/llama-1b-draft"])
    return LoadGroup(
        weights=dice.choice(["bf16", "bnb-int8", "bnb-nf4", "bnb-nf4", "quanto-int4", "quanto-int4"]),
        lm_head=dice.choice(["bf16", "bf16", "nf4"]),
        embeddings=dice.choice(["device", "host"]),
        draft=draft,
        draft_weights="none" if draft == "none" else dice.choice(["bnb-nf4", "bf16"]),
    )


def synthetic_configuration(load: LoadGroup, dice: random.Random) -> Configuration:
    return Configuration(**asdict(load)).replace(
        draft=load.draft if load.draft != "none" else dice.choice(["none", "prompt-lookup"]),
        depth=dice.randint(2, 8),
        cache=dice.choice(["dynamic", "static", "static", *CACHE_BITS]),
        prefill_chunk=dice.choice([0, 512, 1024]),
        launch=dice.choice(["eager", "graph", "compile"]),
    )


def synthetic_memory(configuration: Configuration, context: int) -> dict[str, int]:
    bits = CACHE_BITS.get(configuration.cache, 16)
    sizes = {
        "cuda_context": 610,
        "weights": WEIGHTS_MIB[configuration.weights],
        "lm_head": 1002 if configuration.lm_head == "bf16" else 280,
        "embeddings": 0 if configuration.embeddings == "host" else 1002,
        "draft": 0 if not configuration.has_draft_model else 2360 if configuration.draft_weights == "bf16" else 830,
        "kv_cache": context * 128 / 1024 * bits / 16,
        "draft_kv_cache": context * 32 / 1024 if configuration.has_draft_model else 0,
        "activations": 90 + (configuration.prefill_chunk or context) * 0.07,
        "slack": 60,
    }
    return {owner: int(size * MIB) for owner, size in sizes.items()}


def synthetic_record(configuration: Configuration, context: int, dice: random.Random, stage: str = "search") -> Record:
    """Invented figures of the right order of magnitude; nothing here was measured."""
    record = Record(
        configuration, context, "ok", stage=stage, load_s=41.0, measure_s=dice.uniform(8, 40), witness="invented"
    )
    if configuration.launch != "eager" and configuration.weights == "bnb-int8":
        return replace(record, outcome="unsupported", reason="bnb-int8 cannot be captured in a CUDA graph")
    memory = synthetic_memory(configuration, context)
    peak = sum(memory.values())
    if peak > 1.5 * BUDGET:
        reason = f"CUDA out of memory while loading; {peak / MIB:.0f} MiB were wanted"
        return replace(record, outcome="out_of_memory", reason=reason, measure_s=None)
    if configuration.launch == "compile" and configuration.weights == "quanto-int4":
        reason = "fake-tensor error at scaled_dot_product_attention: " + "expected a strided tensor of known size; " * 9
        return replace(record, outcome="crashed", reason=reason)
    rate = SPEED[configuration.weights] * {"eager": 1, "graph": 2.9, "compile": 3.6}[configuration.launch]
    acceptance = None
    if configuration.draft != "none":
        acceptance = min(0.95, max(0.1, dice.gauss(0.8 if configuration.has_draft_model else 0.45, 0.05)))
        rate *= (1 - acceptance ** (configuration.depth + 1)) / (1 - acceptance) / (1 + 0.3 * configuration.depth)
    rate *= dice.gauss(1, 0.03) / (1 + context / 30_000) * (0.8 if configuration.cache in CACHE_BITS else 1)
    spread, ttft = rate * dice.uniform(0.01, 0.05), 0.05 + context / 9000
    loss = LOSS[configuration.weights] + CACHE_LOSS.get(configuration.cache, 0) + (configuration.lm_head == "nf4") * 0.4
    ratio, error = 1 + loss / 100, 0.0002 + loss * 0.0015
    record = replace(
        record,
        tokens_per_s=rate,
        tokens_per_s_interval=(rate - spread, rate + spread),
        decode_tokens_per_s=rate * 1.1,
        decode_tokens_per_s_interval=(rate * 1.1 - spread, rate * 1.1 + spread),
        ttft_s=ttft,
        ttft_s_interval=(ttft * 0.97, ttft * 1.04),
        acceptance=acceptance,
        peak_bytes=peak,
        memory=memory,
        perplexity_ratio=ratio,
        perplexity_ratio_interval=(ratio - error, ratio + error),
        kl_divergence=loss / 300,
        top1_agreement=1 / (1 + loss / 40),
    )
    if peak > BUDGET:
        over = f"the witness saw {peak / MIB:,.0f} MiB, {(peak - BUDGET) / MIB:,.0f} MiB over the budget"
        unmeasured = {"perplexity_ratio": None, "perplexity_ratio_interval": None, "kl_divergence": None}
        return replace(record, outcome="over_budget", reason=over, **(unmeasured if dice.random() < 0.3 else {}))
    if loss > 5:
        return replace(record, outcome="quality_loss", reason="perplexity ratio above the limit of 1.05")
    if dice.random() < 0.04:
        return replace(Record(configuration, context, "timeout"), reason="no answer within 300 s")
    return record


def synthetic_policy(records: list[Record], contexts: tuple[int, ...]) -> dict[str, Any]:
    """One load group for all contexts, as the contract has it: the one with the most tokens per second in all."""
    best: dict[LoadGroup, dict[int, Record]] = {}
    for record in sorted((r for r in records if r.outcome == "ok"), key=lambda r: r.tokens_per_s or 0):
        best.setdefault(record.configuration.load_group, {})[record.context_tokens] = record
    load = max(best, key=lambda g: (len(best[g]), sum(r.tokens_per_s or 0 for r in best[g].values())))
    rules = []
    for context, chosen in sorted(best[load].items()):
        knobs = {k: v for k, v in asdict(chosen.configuration).items() if k not in asdict(load) or k == "draft"}
        expected = {"tokens_per_s": chosen.tokens_per_s, "peak_bytes": chosen.peak_bytes}
        rules.append({"max_context_tokens": context, "settings": knobs, "expected": expected})
    return {"schema_version": 1, "model": "invented/Llama-3-8B", "load": asdict(load), "rules": rules}


def synthetic_run(count: int = 50, contexts: tuple[int, ...] = (512, 4096, 16384), seed: int = 0) -> RunData:
    dice = random.Random(seed)
    records = [synthetic_record(BASELINE, context, dice, "baseline") for context in contexts]
    loads = [synthetic_load(dice) for _ in range(12)]
    for _ in range(count):
        configuration = synthetic_configuration(dice.choice(loads), dice)
        records += [synthetic_record(configuration, context, dice) for context in contexts]
    info = {
        "started": "2026-01-31 14:05",
        "model": "invented/Llama-3-8B",
        "hardware": {"name": "Invented GPU, 9 GB", "driver": "1.2.3"},
        "versions": {"torch": "2.11.0", "transformers": "5.23.0"},
        "drafts": ["/models/llama-1b-draft"],
    }
    workload = Workload(contexts=contexts)
    return RunData(records, workload, Budget(BUDGET, "cuda:0"), synthetic_policy(records, contexts), info)


class _Page(HTMLParser):
    """The page as a reader and a browser take it: its text outside scripts, and what its tags ask for."""

    def __init__(self, run: RunData, path: Path) -> None:
        super().__init__()
        write_report(run, path)
        self.text, self.tags, self.links, self.policy, self._hidden = "", [], [], "", False
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("script", "style")
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.links += [value for name, value in attrs if name == "style" and "url" in (value or "")]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data + "\n"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture
def page(tmp_path: Path) -> Callable[[RunData], _Page]:
    return lambda run: _Page(run, tmp_path / "report.html")


def one_context(baseline_rate: float, chosen_rate: float, **rule: Any) -> RunData:
    """A baseline and a chosen configuration, each rate with an interval of plus and minus one."""

    def record(configuration: Configuration, rate: float, stage: str) -> Record:
        rates = {"tokens_per_s": rate, "tokens_per_s_interval": (rate - 1, rate + 1), "ttft_s": 0.25}
        quality = {"perplexity_ratio": 1.004, "perplexity_ratio_interval": (1.001, 1.007)}
        return Record(configuration, 4096, "ok", stage=stage, peak_bytes=512 * MIB, **rates, **quality)

    chosen = BASELINE.replace(launch="graph")
    records = [record(BASELINE, baseline_rate, "baseline"), record(chosen, chosen_rate, "final")]
    load = asdict(BASELINE.load_group)
    policy = {
        "model": "m",
        "load": load,
        "rules": [{"max_context_tokens": 4096, "settings": {"launch": "graph"}, **rule}],
    }
    return RunData(records, Workload(contexts=(4096,)), Budget(620 * MIB), policy)


points = st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float))


@given(st.lists(points, max_size=12))
def test_the_front_is_what_no_point_dominates(cloud: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    front = pareto_front(cloud)
    assert sorted(front) == [i for i, p in enumerate(cloud) if not any(beats(other, p) for other in cloud)]
    assert [cloud[i] for i in front] == sorted(cloud[i] for i in front)


def test_a_description_names_only_what_differs() -> None:
    fast = BASELINE.replace(cache="static", draft="prompt-lookup", depth=4, prefill_chunk=512)
    assert describe(fast, BASELINE) == "draft=prompt-lookup, depth=4, cache=static, prefill_chunk=512"
    assert describe(fast.replace(speculation="adaptive"), fast) == "speculation=adaptive"
    assert describe(BASELINE, fast.replace(speculation="adaptive")).startswith("draft=none, cache=")
    assert describe(BASELINE, BASELINE) == "same"
    assert describe(Configuration()) == "weights=bf16"
    assert describe(BASELINE.replace(prefill_chunk=0), fast) == "draft=none, cache=dynamic, prefill_chunk=whole"


@pytest.mark.parametrize(
    "path", ["/models/deep/tiny-draft", "models/tiny-draft/", "owner/tiny-draft", r"C:\x\tiny-draft"]
)
def test_a_draft_is_described_by_its_folder(path: str) -> None:
    assert describe(Configuration(draft=path, depth=2)).split(", ")[1] == "draft=tiny-draft"


def test_the_headline_says_how_much_faster_and_at_what_price(page: Callable[[RunData], _Page]) -> None:
    words = page(one_context(20, 42)).words
    expected = "At 4,096 tokens: 2.1x the baseline, 42.0 tokens/s, 512 of 620 MiB, quality loss 0.40 ± 0.30 %."
    assert expected in words
    assert "41.0 to 43.0" in words


def test_a_tie_is_called_a_tie(page: Callable[[RunData], _Page]) -> None:
    assert "At 4,096 tokens: a tie with the baseline (1.05x)" in page(one_context(20, 21)).words


def test_the_policy_has_the_last_word_on_a_tie(page: Callable[[RunData], _Page]) -> None:
    assert "1.1x the baseline" in page(one_context(20, 21.5, tie=False)).words
    words = page(one_context(20, 42, tie=True, note="the paired difference includes zero")).words
    assert "a tie with the baseline" in words
    assert "the paired difference includes zero" in words


def test_a_kept_baseline_is_said_plainly(page: Callable[[RunData], _Page]) -> None:
    words = page(one_context(20, 21, settings={})).words
    assert "the baseline is kept" in words
    assert "baseline kept" in words


def test_every_chosen_setting_and_context_is_on_the_page(page: Callable[[RunData], _Page]) -> None:
    run = synthetic_run(count=20)
    words = page(run).words
    for rule in run.policy["rules"]:
        assert f"{rule['max_context_tokens']:,}" in words
        assert f"cache={rule['settings']['cache']}" in words
        assert f"launch={rule['settings']['launch']}" in words
    assert f"weights={run.policy['load']['weights']}" in words


def test_every_outcome_is_counted_and_every_reason_given(page: Callable[[RunData], _Page]) -> None:
    run = synthetic_run(count=30)
    words = page(run).words
    for outcome in {record.outcome for record in run.records}:
        assert outcome.replace("_", " ") in words
    assert " ".join(next(r.reason for r in run.records if r.outcome == "crashed").split()) in words


def test_reasons_that_differ_in_numbers_only_are_one_row(page: Callable[[RunData], _Page]) -> None:
    failed = [Record(BASELINE, c, "out_of_memory", reason=f"{c} MiB were wanted") for c in (512, 4096)]
    words = page(RunData(failed, Workload(contexts=(512, 4096)), Budget(BUDGET))).words
    assert "512 MiB were wanted 2" in words
    assert "4,096 (4096 MiB were wanted)" in words


def test_what_comes_from_outside_stays_text(page: Callable[[RunData], _Page]) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    harmless = page(synthetic_run(count=8))
    run = synthetic_run(count=8)
    records = [replace(r, reason=attack, memory={attack: MIB, **r.memory}) for r in run.records]
    draft = f"/models/{attack.replace('/', '|')}"
    records.append(replace(records[0], configuration=BASELINE.replace(draft=draft, depth=2), stage="search"))
    policy = {**run.policy, "model": attack}
    policy["rules"] = [{**rule, "note": attack} for rule in run.policy["rules"]]
    hostile = page(replace(run, records=records, policy=policy, info={attack: attack, "started": attack}))
    assert hostile.tags.count("script") == harmless.tags.count("script")
    assert "img" not in hostile.tags
    assert attack in hostile.text
    assert "<img src=x" not in hostile.source


def test_the_page_loads_nothing(page: Callable[[RunData], _Page]) -> None:
    written = page(synthetic_run(count=8))
    assert written.links == []
    assert written.policy.startswith("default-src 'none'")
    assert "@import" not in written.source
    assert "link" not in written.tags


def strangers() -> dict[str, RunData]:
    run = synthetic_run(count=6)
    failed = [replace(r, outcome="timeout", reason="no answer") for r in run.records]
    blank = [Record(r.configuration, r.context_tokens, "crashed") for r in run.records]
    bare = [replace(r, perplexity_ratio=None, perplexity_ratio_interval=None, peak_bytes=None) for r in run.records]
    rule = {"max_context_tokens": 512, "settings": {"launch": "graph"}, "expected": {"tokens_per_s": 50}}
    return {
        "no policy": replace(run, policy=None),
        "an empty policy": replace(run, policy={}),
        "a policy of unknown configurations": replace(run, policy={"rules": [rule]}),
        "a rule for short prompts only": replace(run, policy={**run.policy, "rules": run.policy["rules"][:1]}),
        "nothing measured": replace(run, records=[], policy=None),
        "one record": replace(run, records=run.records[:1], policy=None),
        "none ok, with figures": replace(run, records=failed, policy=None),
        "none ok, without figures": replace(run, records=blank, policy=None),
        "no quality, no footprint": replace(run, records=bare),
        "one context, all alike": replace(run, records=[r for r in run.records if r.context_tokens == 512][:1] * 3),
    }


@pytest.mark.parametrize("name", list(strangers()))
def test_a_page_can_be_written_of(name: str, page: Callable[[RunData], _Page]) -> None:
    written = page(strangers()[name])
    assert "autotune:" in written.words
    assert "NaN" not in written.text
    assert "None" not in written.text


def test_nothing_that_fits_is_said_plainly(page: Callable[[RunData], _Page]) -> None:
    words = page(strangers()["none ok, without figures"]).words
    assert "Nothing that was measured fits 8,600 MiB and keeps its quality." in words


@pytest.mark.parametrize("objective", ["end-to-end", "decode", "ttft"])
def test_the_objective_is_what_is_drawn(objective: Any, page: Callable[[RunData], _Page]) -> None:
    run = synthetic_run(count=6)
    unit = {"end-to-end": "tokens/s", "decode": "decode tokens/s", "ttft": "first tokens/s"}[objective]
    assert unit in page(replace(run, workload=replace(run.workload, objective=objective))).words


def test_a_finalist_measured_again_replaces_its_first_measurement(page: Callable[[RunData], _Page]) -> None:
    run = one_context(20, 42)
    again = replace(run.records[1], tokens_per_s=30.0, tokens_per_s_interval=(29.0, 31.0))
    early = replace(run.records[1], stage="search")
    assert "1.5x the baseline" in page(replace(run, records=[run.records[0], again, early])).words


@pytest.mark.parametrize(
    ("floor", "said"), [(0.0039, "quality loss 0.40 ± 0.30 %"), (0.0041, "quality loss within noise")]
)
def test_a_difference_below_the_noise_floor_reads_as_none(
    floor: float, said: str, page: Callable[[RunData], _Page]
) -> None:
    info = {"reference": {"noise_floor": {"512": {"ln_ratio": floor, "kl_divergence": 1e-4}}}}
    shown = page(replace(one_context(20, 42), info=info))
    assert said in shown.words
    loss = "within noise" if floor > 0.004 else "0.40 %"
    assert f"s, loss {loss}" in shown.source
    assert ("0.40 ± 0.30" in shown.words) == (floor < 0.004)


def test_a_tasks_figures_are_in_the_table_where_there_is_a_task(page: Callable[[RunData], _Page]) -> None:
    run = one_context(20, 42)
    assert "task F1" not in page(run).words
    asked = [replace(record, task_f1=0.625, task_exact_match=0.5) for record in run.records]
    words = page(replace(run, records=asked)).words
    assert "task exact match, % task F1, %" in words
    assert "50.0 62.5" in words


def test_the_same_results_give_the_same_page(page: Callable[[RunData], _Page]) -> None:
    assert page(synthetic_run(count=6)).source == page(synthetic_run(count=6)).source


CHOSEN = BASELINE.replace(launch="graph")
OTHER_LOAD = CHOSEN.replace(lm_head="nf4")


def why(*records: Record, chosen: Record | None = None, **given: Any) -> RunData:
    """A run at 4,096 tokens that chose CHOSEN, 100 tokens/s, under a budget of 1,000 MiB, beside these records."""
    chosen = chosen or synthetic(CHOSEN, 100)
    knobs = {"settings": {"launch": "graph"}, "load": asdict(CHOSEN.load_group)}
    policy = {"model": "m", "load": knobs["load"], "rules": [{"max_context_tokens": 4096, **knobs}]}
    workload = Workload(contexts=(4096,), max_quality_loss=0.05)
    return RunData([chosen, *records], workload, Budget(1000 * MIB), policy, **given)


def synthetic(configuration: Configuration, rate: float, outcome: Any = "ok", **figures: Any) -> Record:
    reason = "" if outcome == "ok" else f"it is {outcome}"
    return measured(configuration, 4096, (rate, 1.01 * rate, 0.99 * rate), outcome=outcome, reason=reason, **figures)


def fact(page: _Page, name: str) -> str:
    """What the page says after a term of the only context."""
    terms = ["Knobs that mattered", "Runner-up", "Rejected", "1 GB more buys", "1 % more loss buys", "Throughput"]
    words = page.words.partition("Why this one, at 4,096 tokens")[2]
    return words.partition(name)[2].partition(terms[terms.index(name) + 1])[0].strip()


def test_the_runner_up_is_the_next_that_is_feasible_and_says_what_it_lost_by(page: Callable[[RunData], _Page]) -> None:
    near, far = synthetic(CHOSEN.replace(cache="static"), 90), synthetic(CHOSEN.replace(cache="quantized-4"), 80)
    lost = synthetic(CHOSEN.replace(prefill_chunk=512), 95, "wrong_output")
    said = fact(page(why(far, near, lost)), "Runner-up")
    most, least = (100 - 100 * end for end in speedup([near], [synthetic(CHOSEN, 100)], "end-to-end")[1:])
    lost_by = f"10.0 % slower ({least:.1f} to {most:.1f} %)"
    assert said == f"Of this load and of all: cache=static with 90.0 tokens/s, {lost_by}."


def test_the_runner_up_of_another_load_stands_beside_that_of_this_one(page: Callable[[RunData], _Page]) -> None:
    records = [synthetic(CHOSEN.replace(cache="static"), 90), synthetic(OTHER_LOAD, 150)]
    said = fact(page(why(*records)), "Runner-up")
    assert said.startswith("Of this load: cache=static with 90.0 tokens/s")
    assert "Of all: lm_head=nf4 with 150 tokens/s, 50.0 % faster" in said
    assert said.endswith("; but one load serves all contexts.")
    assert "one load" not in fact(page(why(*records, info={"reloads": True})), "Runner-up")
    kept = synthetic(CHOSEN, 100, stage="baseline")
    assert "one load" not in fact(page(why(*records, chosen=kept)), "Runner-up")
    assert fact(page(why(records[1])), "Runner-up").startswith("Of this load: none that is feasible. Of all: lm_head")
    assert fact(page(why()), "Runner-up") == "No other configuration that was measured here is feasible."


def test_a_tie_goes_to_the_simpler_and_says_so(page: Callable[[RunData], _Page]) -> None:
    more, fewer = CHOSEN.replace(cache="static"), BASELINE.replace(cache="dynamic")
    said = fact(page(why(synthetic(more, 101))), "Runner-up")
    assert "a tie within error: +1.0 % (-" in said
    assert said.endswith("; the chosen is simpler.")
    assert "simpler" not in fact(page(why(synthetic(fewer, 101))), "Runner-up")
    loaded = synthetic(BASELINE.replace(weights="quanto-int4"), 101)  # simpler as it stands, but not what it loads
    assert fact(page(why(loaded)), "Runner-up").endswith("; the chosen load is simpler.")
    simpler = synthetic(BASELINE.replace(weights="bf16", cache="static", prefill_chunk=64), 101)
    assert "simpler" not in fact(page(why(simpler)), "Runner-up")


def test_chunks_that_the_prompts_fit_are_the_chosen_and_no_runner_up(page: Callable[[RunData], _Page]) -> None:
    chunks = synthetic(CHOSEN.replace(prefill_chunk=4096), 100, peak=777 * MIB)
    whole = page(why(chunks, chosen=synthetic(CHOSEN, 90, stage="baseline")))
    assert fact(whole, "Runner-up") == "No other configuration that was measured here is feasible."
    assert "777" in page(why(chosen=chunks)).words


def test_a_comparison_rests_on_what_was_measured_alike(page: Callable[[RunData], _Page]) -> None:
    """The finals of the chosen are slower than its search; a runner-up without finals is compared with the search."""
    final, stock = synthetic(CHOSEN, 100, stage="final"), synthetic(BASELINE, 90, stage="baseline")
    again, other = synthetic(BASELINE, 80, stage="final"), synthetic(CHOSEN.replace(cache="static"), 110)
    run = why(final, other, chosen=synthetic(CHOSEN, 120))
    assert ", 8.3 % slower (" in fact(page(run), "Runner-up")
    run = why(final, stock, again, chosen=synthetic(CHOSEN, 120))
    assert "the baseline with 80.0 tokens/s, 20.0 % slower (" in fact(page(run), "Runner-up")


def test_noise_is_compared_with_nothing(page: Callable[[RunData], _Page]) -> None:
    noise, other = synthetic(CHOSEN, 50, "unstable"), synthetic(CHOSEN.replace(cache="static"), 90)
    said = fact(page(why(synthetic(CHOSEN, 100, stage="final"), other, chosen=noise)), "Runner-up")
    assert ", 10.0 % slower (" in said


def test_what_failed_once_is_no_runner_up(page: Callable[[RunData], _Page]) -> None:
    other = CHOSEN.replace(cache="static")
    run = why(synthetic(other, 110, "wrong_output"), synthetic(other, 110, stage="final"))
    assert fact(page(run), "Runner-up").startswith("No other configuration")
    assert fact(page(run), "Rejected").startswith("Of what was faster, 1 wrong output.")


def test_faster_ones_that_were_rejected_are_counted_and_the_fastest_named(page: Callable[[RunData], _Page]) -> None:
    chunks = [CHOSEN.replace(prefill_chunk=size) for size in (64, 128, 256, 512)]
    slow = synthetic(CHOSEN.replace(cache="quantized-8"), 50, "unstable")
    failed = [Record(CHOSEN.replace(cache="static", prefill_chunk=size), 4096, "out_of_memory") for size in (1, 2)]
    faster = [synthetic(chunks[0], 120, "over_budget"), synthetic(chunks[1], 130, "wrong_output")]
    faster += [synthetic(chunks[2], 110, "over_budget"), synthetic(chunks[3], 105, "quality_loss")]
    said = fact(page(why(slow, *failed, *faster)), "Rejected")
    assert said.startswith("Of what was faster, 2 over budget, 1 wrong output, 1 quality loss. The fastest: ")
    assert "prefill_chunk=128 with 130 tokens/s, 30.0 % faster (" in said
    assert "Wrong output: it is wrong_output. Failed before there was a rate: 2 out of memory." in said
    assert fact(page(why(slow)), "Rejected") == "Nothing that was faster."


def test_where_nothing_is_chosen_it_says_what_ran(page: Callable[[RunData], _Page]) -> None:
    noisy, over = synthetic(CHOSEN, 100, "unstable"), synthetic(BASELINE, 50, "over_budget", peak=1001 * MIB)
    words = page(replace(why(over, chosen=noisy), policy=None)).words
    assert "Why nothing, at 4,096 tokens Knobs that mattered" in words
    assert "Runner-up Nothing is chosen here. Rejected Of what ran, 1 unstable, 1 over budget. The fastest: " in words
    assert "1 GB more buys weights=bnb-nf4 with 50.0 tokens/s. It held 1,001 MiB" in words


def test_one_more_gigabyte_buys_what_lacked_only_that(page: Callable[[RunData], _Page]) -> None:
    def over(prefill_chunk: int, rate: float, peak: int, ratio: float | None = 1.01) -> Record:
        configuration = CHOSEN.replace(prefill_chunk=prefill_chunk)
        return synthetic(configuration, rate, "over_budget", peak=1000 * MIB + peak, ratio=ratio)

    far, lossy, unknown = over(1, 190, 10**9 + 1), over(2, 180, MIB, 1.06), over(3, 170, MIB, None)
    slower, most, less = over(4, 90, MIB), over(5, 130, 10**9, 1.05), over(6, 120, MIB)
    said = fact(page(why(far, lossy, unknown, slower, less, most)), "1 GB more buys")
    assert said.startswith("prefill_chunk=5 with 130 tokens/s, 30.0 % faster (")
    assert "It held 1,954 MiB, quality loss 5.00 %." in said
    assert fact(page(why(far, lossy, unknown, slower)), "1 GB more buys") == "Nothing that was measured."


def test_one_per_cent_more_loss_buys_what_lacked_only_that(page: Callable[[RunData], _Page]) -> None:
    def lossy(prefill_chunk: int, rate: float, ratio: float, outcome: str = "quality_loss") -> Record:
        return synthetic(CHOSEN.replace(prefill_chunk=prefill_chunk), rate, outcome, ratio=ratio)

    far, broken, slower = lossy(1, 190, 1.0601), lossy(2, 180, 1.055, "wrong_output"), lossy(3, 90, 1.055)
    said = fact(page(why(far, broken, slower, lossy(4, 120, 1.0599), lossy(5, 110, 1.051))), "1 % more loss buys")
    assert said.startswith("prefill_chunk=4 with 120 tokens/s, 20.0 % faster (")
    assert fact(page(why(far, broken, slower)), "1 % more loss buys") == "Nothing that was measured."


def test_the_knobs_that_mattered_are_named_or_why_not(page: Callable[[RunData], _Page]) -> None:
    shares = {4096: {"launch": 0.7, "cache": 0.26, "draft": 0.04}}
    said = fact(page(why(importances=shares)), "Knobs that mattered")
    assert said == "launch 70 %, cache 26 % of what set the faster half of the finished trials apart."
    assert fact(page(why()), "Knobs that mattered") == "Too few trials finished here to say."


def pictured(page: _Page, name: str) -> list[dict[str, Any]]:
    """The traces of a picture; none where the page does not have it."""
    found = re.search(rf'Plotly.newPlot\(\s*"{name}",\s*', page.source)
    return json.JSONDecoder().raw_decode(page.source, found.end())[0] if found else []


def test_memory_is_stacked_over_context_for_the_baseline_and_the_chosen(page: Callable[[RunData], _Page]) -> None:
    run = synthetic_run(count=20)
    drawn = pictured(page(run), "memory-over-context")
    records = [r for r in run.records if r.stage == "baseline" and r.memory]
    ours, theirs = ([trace for trace in drawn if trace["xaxis"] == axis] for axis in ("x", "x2"))
    assert [trace["stackgroup"] for trace in drawn] == ["owners"] * len(drawn)
    sums = [sum(trace["y"][i] for trace in ours) for i in range(len(records))]
    assert [round(size) for size in sums] == [round(sum(r.memory.values()) / MIB) for r in records]
    assert [trace["x"] for trace in ours] == [[r.context_tokens for r in records]] * len(ours)
    peaks = [round(rule["expected"]["peak_bytes"] / MIB) for rule in run.policy["rules"]]
    assert [round(sum(trace["y"][i] for trace in theirs)) for i in range(len(peaks))] == peaks
    assert {trace["name"] for trace in theirs} >= {"weights", "kv cache", "activations"}
    assert pictured(page(synthetic_run(count=4, contexts=(512,))), "memory-over-context") == []


def test_no_heavy_import_comes_with_the_module() -> None:
    code = "import sys, autotune.report.page; print(*{'torch', 'optuna', 'plotly', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
