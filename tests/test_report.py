"""The report: drawn from stored results only, one file, offline, and safe against what the results contain."""

from __future__ import annotations

import random
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
from autotune.report import RunData, describe, pareto_front, write_report

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


def test_no_heavy_import_comes_with_the_module() -> None:
    code = "import sys, autotune.report; print(*{'torch', 'optuna', 'plotly', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
