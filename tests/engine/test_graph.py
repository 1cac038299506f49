"""Recorded steps without a GPU: where nothing can be recorded, a replay runs the same step on the same buffers."""

from __future__ import annotations

import itertools
import random
from functools import lru_cache

import pytest
import torch

from autotune.config import Configuration, LoadGroup
from autotune.engine import graph
from autotune.engine.decode import Engine, Sampling
from autotune.engine.depth import PROBE, AdaptiveDepth
from autotune.engine.support import Unsupported
from tests.tiny_models import CONFIGS, PROMPT, make_model

VOCABULARY = 60
CACHES = ("static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8")


@pytest.fixture(autouse=True)
def _record_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))


def make_engine(name: str = "llama", attention: str = "sdpa", ahead: bool = False) -> Engine:
    target = make_model(name, attention)
    draft = make_model(name, attention)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    engine = Engine(target, draft, LoadGroup(draft="draft", attention=attention), "cpu")
    engine.ahead = ahead
    return engine


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_steps_give_the_eager_text(name: str, cache: str) -> None:
    engine = make_engine(name, ahead=True)
    eager = Configuration(cache=cache, prefill_chunk=32)
    expected = engine.generate(PROMPT, eager, 130).tokens
    assert len(set(expected)) > 5
    assert engine.generate(PROMPT, eager.replace(launch="graph"), 130).tokens == expected


@lru_cache
def eager_text(name: str, cache: str) -> list[int]:
    return make_engine(name).generate(PROMPT, Configuration(cache=cache), 130).tokens


@pytest.mark.parametrize("draft", ["draft", "prompt-lookup"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_speculation_in_recorded_steps_gives_the_eager_text(name: str, cache: str, draft: str) -> None:
    speculative = Configuration(cache=cache, draft=draft, depth=4, launch="graph")
    result = make_engine(name).generate(PROMPT, speculative, 130)
    assert result.tokens == eager_text(name, cache)
    assert result.verifications > 0
    if draft == "draft":
        assert result.accepted > 0


@pytest.mark.parametrize("cache", ["static", "quantized-4"])
def test_eager_attention_is_masked_in_recorded_steps(cache: str) -> None:
    engine = make_engine(attention="eager")
    configuration = Configuration(cache=cache, attention="eager")
    expected = engine.generate(PROMPT, configuration, 40).tokens
    assert engine.generate(PROMPT, configuration.replace(launch="graph"), 40).tokens == expected


def test_sampling_draws_the_same_tokens() -> None:
    engine = make_engine(ahead=True)
    configuration = Configuration(cache="static")
    sampling = Sampling(temperature=1.0, seed=3)
    expected = engine.generate(PROMPT, configuration, 40, sampling=sampling).tokens
    assert engine.generate(PROMPT, configuration.replace(launch="graph"), 40, sampling=sampling).tokens == expected


def test_a_text_that_stops_early_leaves_no_trace() -> None:
    engine = make_engine(ahead=True)
    configuration = Configuration(cache="quantized-4", launch="graph")
    whole = engine.generate(PROMPT, configuration, 100).tokens
    stop = whole[30]
    stopped = engine.generate(PROMPT, configuration, 100, stop=[stop]).tokens
    assert stopped == whole[: whole.index(stop) + 1]
    assert engine.generate(PROMPT, configuration, 100).tokens == whole


def test_recordings_serve_the_requests_of_one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record = graph.StepRunner._record

    def counted(self: graph.StepRunner, size: int) -> graph._Step:
        recorded.append(size)
        return record(self, size)

    monkeypatch.setattr(graph.StepRunner, "_record", counted)
    engine = make_engine()
    configuration = Configuration(cache="static", draft="draft", depth=4, launch="graph")
    first = engine.generate(PROMPT, configuration, 60).tokens
    assert {1, 5} <= set(recorded) <= {1, 2, 5}  # the draft's single step and catch-up, and the verification
    recorded.clear()
    assert engine.generate(PROMPT, configuration, 60).tokens == first
    assert engine.generate(PROMPT[:50], configuration, 20).tokens != first
    assert not recorded
    engine.generate(PROMPT * 4, configuration, 20)  # another bucket
    assert recorded


def test_a_target_and_its_draft_share_the_memory_of_their_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_new_pool", lambda device: object())
    engine = make_engine()
    configuration = Configuration(cache="static", draft="draft", depth=2, launch="graph")
    seen = []
    for prompt in (PROMPT, PROMPT * 4):  # another bucket, whose recordings are others
        engine.generate(prompt, configuration, 8)
        pools = {runner.pool for runner in engine._recordings.kept.values() if isinstance(runner, graph.StepRunner)}
        assert len(engine._recordings.kept) == 2
        assert len(pools) == 1
        seen += pools
    assert seen[0] is not seen[1]


@pytest.mark.parametrize("draft", ["draft", "prompt-lookup"])
@pytest.mark.parametrize("cache", CACHES)
def test_an_adaptive_depth_records_few_steps_and_gives_the_eager_text(
    monkeypatch: pytest.MonkeyPatch, cache: str, draft: str
) -> None:
    recorded: set[tuple[bool, int]] = set()
    record, dice = graph.StepRunner._record, random.Random(4)
    engine = make_engine()

    def counted(self: graph.StepRunner, size: int) -> graph._Step:
        recorded.add((self.model is engine.target, size))
        return record(self, size)

    def planted(self: AdaptiveDepth, limit: int) -> int:
        allowed = [depth for depth in self.depths if depth <= max(limit, 0)]
        self.chosen = 0 if self.idle % PROBE > 0 else dice.choice(allowed)
        return self.chosen

    monkeypatch.setattr(graph.StepRunner, "_record", counted)
    monkeypatch.setattr(AdaptiveDepth, "choose", planted)
    plain = Configuration(cache=cache)
    expected = engine.generate(PROMPT, plain, 200).tokens
    configuration = plain.replace(draft=draft, depth=8, speculation="adaptive", launch="graph")
    for _ in range(2):
        assert engine.generate(PROMPT, configuration, 200).tokens == expected
    assert {size for target, size in recorded if target} <= {1, 2, 3, 5, 9}
    assert {size for target, size in recorded if not target} == ({1, 2, PROBE + 2} if draft == "draft" else set())


@pytest.mark.parametrize("draft", ["draft", "none"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_conversation_goes_on_in_recorded_steps(cache: str, draft: str) -> None:
    engine, other = make_engine(ahead=True), make_engine()
    configuration = Configuration(
        cache=cache, draft=draft, depth=3 * (draft != "none"), launch="graph", prefill_chunk=32
    )
    history: list[int] = []
    for turn, cached in ((PROMPT, 0), (PROMPT[:20], 64), (PROMPT[:60], 128)):
        history += turn
        result = engine.generate(history, configuration, 30, keep=400)
        assert result.tokens == other.generate(history, configuration.replace(launch="eager"), 30).tokens
        assert result.cached_tokens >= cached  # in whole chunks where the cache is quantized
        assert (result.cached_tokens % 32 == 0) == (cache != "static" or cached == 0)
        history += result.tokens


def test_a_cache_that_others_used_meanwhile_is_not_gone_on_from() -> None:
    engine = make_engine()
    configuration = Configuration(cache="quantized-4", launch="graph", prefill_chunk=32)
    other = [*PROMPT[40:], *PROMPT[:40]]
    expected = {len(prompt): engine.generate(prompt, configuration, 20).tokens for prompt in (PROMPT, other[:70])}
    engine.generate(PROMPT, configuration, 20, keep=250)
    engine.generate(other, configuration, 20)  # a measurement, in the same memory
    result = engine.generate(PROMPT, configuration, 20, keep=250)
    assert (result.tokens, result.cached_tokens) == (expected[len(PROMPT)], 0)
    asked = itertools.chain([False, False], itertools.repeat(True))  # before the last chunk of three
    assert not engine.generate(other, configuration, 20, keep=250, ended=lambda: next(asked)).tokens
    result = engine.generate(other[:70], configuration, 20, keep=250)  # what was marked is of the prompt before
    assert (result.tokens, result.cached_tokens) == (expected[70], 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_conversations_in_several_caches_keep_their_steps_until_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    recorded: list[int] = []
    record = graph.StepRunner._record
    monkeypatch.setattr(graph.StepRunner, "_record", lambda self, size: recorded.append(size) or record(self, size))
    engine = make_engine(attention=attention)
    words = ("static", "quantized-8")
    configurations = [
        Configuration(cache=cache, draft="draft", depth=3, launch="graph", attention=attention) for cache in words
    ]
    texts = [engine.generate(PROMPT, configuration, 20, keep=400).tokens for configuration in configurations]
    recorded.clear()
    assert [engine.generate(PROMPT, chosen, 20, keep=400).tokens for chosen in configurations] == texts
    assert not recorded
    engine.recover()
    for chosen, text in zip(configurations, texts, strict=True):
        assert engine.generate(PROMPT, chosen, 20, keep=400).tokens == text
        assert {(role, key[0]) for role, key in engine._recordings.kept} == {
            ("target", chosen.cache),
            ("draft", chosen.cache),
        }


def test_only_one_cache_is_kept_for_a_model() -> None:
    engine = make_engine()
    for cache in ("static", "quantized-4"):
        engine.generate(PROMPT, Configuration(cache=cache, draft="draft", depth=3, launch="graph"), 8)
        assert {runner.key[0] for runner in engine._recordings.kept.values()} == {cache}
    engine.generate(PROMPT, Configuration(cache="static", launch="graph"), 8)
    assert {role for role, _ in engine._recordings.kept} == {"target"}
    engine.generate(PROMPT, Configuration(), 8)
    assert not engine._recordings.kept


@pytest.mark.parametrize("cache", ["static", "quantized-4"])
@pytest.mark.parametrize("step", [1, 7, 40])
def test_scores_are_the_eager_ones(cache: str, step: int) -> None:
    engine = make_engine()
    configuration = Configuration(cache=cache, prefill_chunk=32)
    expected = engine.score(PROMPT, PROMPT * 2, configuration, step)
    recorded = engine.score(PROMPT, PROMPT * 2, configuration.replace(launch="graph"), step)
    torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-4)


def test_a_step_past_the_end_is_refused_before_it_is_launched() -> None:
    model = make_model("llama")
    runner = graph.StepRunner(model, ("static", "graph", "sdpa", 256), "cpu", "device")
    runner.start((1,))
    with torch.inference_mode():
        runner.prefill(PROMPT * 2 + PROMPT[:76], 0)
        with pytest.raises(ValueError, match="257 tokens do not fit a cache of 256"):
            runner.feed(torch.tensor([1]))


@pytest.mark.parametrize(
    ("configuration", "group", "reason"),
    [
        (Configuration(cache="dynamic"), LoadGroup(), "fixed shape"),
        (Configuration(cache="offloaded"), LoadGroup(), "fixed shape"),
        (Configuration(cache="sliding"), LoadGroup(), "fixed shape"),
        (Configuration(cache="static"), LoadGroup(weights="bnb-int8"), "bnb-int8"),
        (Configuration(cache="static"), LoadGroup(attention="flash_attention_2"), "flash_attention_2"),
    ],
)
def test_what_cannot_be_recorded_is_unsupported(configuration: Configuration, group: LoadGroup, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        graph.check_launch(configuration.replace(launch="graph"), group, "cpu")


@pytest.mark.parametrize("launch", ["graph", "compile"])
def test_recording_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    monkeypatch.setattr(graph, "DEVICES", ("cuda",))
    with pytest.raises(Unsupported, match=f"launch = {launch} needs a GPU"):
        make_engine().generate(PROMPT, Configuration(cache="static", launch=launch), 4)


@pytest.fixture
def gpu_engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    monkeypatch.setattr(graph, "DEVICES", ("cuda",))
    engine = make_engine()
    assert engine.draft is not None
    engine.target.to("cuda")
    engine.draft.to("cuda")
    return Engine(engine.target, engine.draft, engine.group, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHES)
def test_graphs_give_the_eager_text_on_a_gpu(gpu_engine: Engine, cache: str) -> None:
    eager = Configuration(cache=cache)
    expected = gpu_engine.generate(PROMPT, eager, 130).tokens
    assert gpu_engine.generate(PROMPT, eager.replace(launch="graph"), 130).tokens == expected
    speculative = eager.replace(draft="draft", depth=4, launch="graph")
    assert gpu_engine.generate(PROMPT, speculative, 130).tokens == expected
    adaptive = speculative.replace(depth=8, speculation="adaptive")
    assert gpu_engine.generate(PROMPT, adaptive, 130).tokens == expected


@pytest.mark.gpu
@pytest.mark.parametrize("launch", ["eager", "graph"])
@pytest.mark.parametrize("cache", [*CACHES, "dynamic", "offloaded"])
def test_conversations_go_on_on_a_gpu(gpu_engine: Engine, cache: str, launch: str) -> None:
    if launch == "graph" and cache not in CACHES:
        pytest.skip("only caches of fixed shape are recorded")
    configuration = Configuration(cache=cache, draft="draft", depth=3, launch=launch, prefill_chunk=32)
    fresh = Engine(gpu_engine.target, gpu_engine.draft, gpu_engine.group, "cuda")
    history: list[int] = []
    for turn, cached in ((PROMPT, 0), (PROMPT[:20], 64), (PROMPT[:60], 128)):
        history += turn
        result = gpu_engine.generate(history, configuration, 30, keep=400)
        assert result.tokens == fresh.generate(history, configuration, 30, keep=400).tokens
        assert result.cached_tokens >= cached
        history += result.tokens
        fresh.close()
