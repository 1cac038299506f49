"""The decode loop: every knob combined gives the text that it should, and what goes wrong is seen."""

import copy
import io
import itertools
import random
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from autotune.config import Configuration, LoadGroup
from autotune.engine import decode, depth, runner
from autotune.engine.cache import make_cache, settle
from autotune.engine.decode import NGRAM, Engine, Generation, Sampling, _PromptLookup, _verify
from autotune.engine.depth import PROBE, PROBE_DEPTH, TRIES, AdaptiveDepth
from autotune.engine.runner import Runner
from autotune.engine.support import Unsupported
from autotune.measure.quality import compare
from autotune.trial.worker import Worker
from tests.tiny_models import FAMILIES, VOCABULARY, WINDOW, draft_of, tiny, tokens

EXACT = ("dynamic", "static", "sliding")
QUANTIZED = ("quantized-8", "quantized-4", "quantized-2", "quantized-fp8")
NEW_TOKENS = 60
DRAFT = "a draft model"
GROUP = LoadGroup("fp32", "fp32", draft=DRAFT, draft_weights="fp32")


class Case(NamedTuple):
    family: str
    cache: str
    drafting: tuple[str, int, str]  # draft, depth and speculation
    chunk: int
    attention: str

    @property
    def configuration(self) -> Configuration:
        draft, depth, speculation = self.drafting
        return Configuration(
            "fp32",
            "fp32",
            draft=draft,
            depth=depth,
            speculation=speculation,
            cache=self.cache,
            attention=self.attention,
            prefill_chunk=self.chunk,
        )

    def __str__(self) -> str:
        draft, depth, speculation = self.drafting
        drafting = f"{draft.split()[-1]}-{speculation}-{depth}"
        return f"{self.family}-{self.cache}-{drafting}-chunk{self.chunk}-{self.attention}"


DRAFTINGS = [
    ("none", 0, "constant"),
    *itertools.product(("prompt-lookup", DRAFT), (1, 4, 7), ("constant",)),
    *itertools.product(("prompt-lookup", DRAFT), (7,), ("adaptive",)),
]
LEGAL = [
    case
    for case in itertools.starmap(
        Case, itertools.product(FAMILIES, EXACT + QUANTIZED, DRAFTINGS, (0, 37), ("sdpa", "eager"))
    )
    if case.cache != "sliding" or case.family in ("mistral", "gemma3")
]


def goals(case: Case) -> set[Any]:
    """What a case covers: each pair of knobs, and cache, drafting and chunk together."""
    pairs = set(itertools.combinations(enumerate(case), 2))
    return pairs | {(case.cache, case.drafting, case.chunk)}


def covering(cases: list[Case]) -> list[Case]:
    """A small set of cases that reaches every goal that all of them reach."""
    left = set().union(*map(goals, cases))
    pool, chosen = random.Random(0).sample(cases, len(cases)), []
    while left:
        best = max(pool, key=lambda case: len(goals(case) & left))
        chosen.append(best)
        left -= goals(best)
    return sorted(chosen)


CASES = covering(LEGAL)


@lru_cache
def target_of(family: str, attention: str = "sdpa") -> PreTrainedModel:
    model = tiny(family, **({"tie_word_embeddings": False} if family == "gemma3" else {}))
    model.set_attn_implementation(attention)
    return model


@lru_cache
def engine_of(family: str, attention: str = "sdpa") -> Engine:
    """The target with a draft that is believed now and then."""
    target = target_of(family, attention)
    return Engine(target, draft_of(target, 0.03), GROUP, "cpu")


def prompt_of(family: str) -> list[int]:
    index = list(FAMILIES).index(family)
    return tokens(150 + 19 * index, seed=index)


@lru_cache
def stock_text(family: str, attention: str = "sdpa") -> list[int]:
    prompt = torch.tensor([prompt_of(family)])
    model = target_of(family, attention)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True
    )
    return output[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, prompt: list[int], cache: str, chunk: int, count: int) -> list[int]:
    """One token after the other through the cache: what no speculation gives."""
    store = make_cache(cache, model.config, 400, "cpu")
    for part in torch.tensor([prompt]).split(chunk or len(prompt), dim=1):
        logits = model(part, past_key_values=store).logits
        settle(store)
    text = [int(logits[0, -1].argmax())]
    while len(text) < count:
        logits = model(torch.tensor([text[-1:]]), past_key_values=store).logits
        settle(store)
        text.append(int(logits[0, -1].argmax()))
    return text


@lru_cache
def plain_text(family: str, cache: str, chunk: int, attention: str = "sdpa") -> list[int]:
    return one_by_one(target_of(family, attention), prompt_of(family), cache, chunk, NEW_TOKENS)


def run(family: str, configuration: Configuration, new_tokens: int = NEW_TOKENS, **options: Any) -> Generation:
    return engine_of(family, configuration.attention).generate(prompt_of(family), configuration, new_tokens, **options)


def assert_books_balance(result: Generation, depth: int) -> None:
    assert len(result.step_s) == len(result.step_tokens)
    assert sum(result.step_tokens) + 1 == len(result.tokens)
    assert all(1 <= count <= depth + 1 for count in result.step_tokens)
    assert 0 <= result.accepted <= result.proposed <= result.verifications * max(depth, 1)
    assert result.decode_s == sum(result.step_s)
    assert result.ttft_s > 0
    assert min(result.step_s, default=1) > 0


# ---- greedy


def test_the_cases_cover_every_legal_pair_of_knobs():
    assert set().union(*map(goals, CASES)) == set().union(*map(goals, LEGAL))
    assert len(CASES) < len(LEGAL) / 5
    assert sum(case.configuration.speculation == "adaptive" for case in CASES) >= 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_write_text_that_varies(family):
    assert len(set(stock_text(family))) >= 8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_text_is_that_of_plain_decoding(case):
    draft, depth, _ = case.drafting
    result = run(case.family, case.configuration)
    if case.cache in EXACT:
        assert result.tokens == stock_text(case.family, case.attention)
    else:
        assert result.tokens == plain_text(case.family, case.cache, case.chunk, case.attention)
    assert_books_balance(result, depth)
    assert (result.proposed > 0) == (draft != "none")
    assert result.cache_bytes > 0
    assert (result.draft_cache_bytes > 0) == (draft == DRAFT)


@pytest.mark.parametrize("cache", ["static", "quantized-4"])
@pytest.mark.parametrize("depth", [31, 95, 200])
def test_a_depth_beyond_the_window_is_cut_to_what_can_be_rolled_back(cache, depth):
    configuration = Configuration("fp32", "fp32", draft=DRAFT, depth=depth, cache=cache)
    assert run("qwen3", configuration).tokens == plain_text("qwen3", cache, 0)


@pytest.mark.parametrize("cache", ["dynamic", "quantized-2", "sliding"])
@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_prompts_work(cache, draft, length):
    engine, prompt = engine_of("mistral"), tokens(100)[:length]
    configuration = Configuration("fp32", "fp32", draft=draft, depth=4, cache=cache)
    expected = engine.generate(prompt, Configuration("fp32", "fp32", cache=cache), 20).tokens
    assert engine.generate(prompt, configuration, 20).tokens == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_that_is_the_target_is_always_believed(family):
    engine = Engine(target_of(family), target_of(family), GROUP, "cpu")
    result = engine.generate(prompt_of(family), Configuration("fp32", "fp32", draft=DRAFT, depth=4), NEW_TOKENS)
    assert result.accepted == result.proposed == NEW_TOKENS - 1 - result.verifications
    assert result.step_tokens[:-1] == [5] * (len(result.step_tokens) - 1)


def test_an_idle_draft_model_changes_nothing():
    result = run("llama", Configuration("fp32", "fp32", draft=DRAFT, depth=0))
    assert result.tokens == stock_text("llama")
    assert result.proposed == result.verifications == result.draft_cache_bytes == 0


@pytest.mark.parametrize("cache", ["dynamic", "quantized-4"])
def test_launching_a_step_ahead_changes_nothing(cache):
    engine = Engine(target_of("llama"), None, LoadGroup("fp32", "fp32"), "cpu")
    engine.ahead = True  # as on a GPU
    configuration, text = Configuration("fp32", "fp32", cache=cache), plain_text("llama", cache, 0)
    assert engine.generate(prompt_of("llama"), configuration, NEW_TOKENS).tokens == text
    result = engine.generate(prompt_of("llama"), configuration, NEW_TOKENS, stop=[text[20]])
    assert result.tokens == text[: text.index(text[20]) + 1]
    sampled = [engine.generate(prompt_of("llama"), configuration, 30, sampling=Sampling(1.0, 5)).tokens]
    engine.ahead = False
    assert sampled == [engine.generate(prompt_of("llama"), configuration, 30, sampling=Sampling(1.0, 5)).tokens]


# ---- an adaptive depth


def plant_costs(monkeypatch: pytest.MonkeyPatch, share: float) -> list[int]:
    """Every drafted token costs this share of a step, whatever the clock says; the depths as they come."""
    depths: list[int] = []
    observe = AdaptiveDepth.observe

    def planted(self: AdaptiveDepth, proposed: int, accepted: int, seconds: float) -> None:
        assert seconds > 0
        depths.append(proposed)
        observe(self, proposed, accepted, 1 + share * proposed)

    monkeypatch.setattr(AdaptiveDepth, "observe", planted)
    return depths


def plant_depths(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Any depths, and many steps in a row without speculation."""
    dice = random.Random(seed)

    def planted(self: AdaptiveDepth, limit: int) -> int:
        allowed = [depth for depth in self.depths if depth <= max(limit, 0)]
        self.chosen = 0 if self.idle % PROBE > 0 else dice.choice(allowed)
        return self.chosen

    monkeypatch.setattr(AdaptiveDepth, "choose", planted)


ADAPTIVE = Configuration("fp32", "fp32", draft=DRAFT, depth=8, speculation="adaptive")
LONG_TEXT = 160


def contrary(target: PreTrainedModel) -> PreTrainedModel:
    """A draft that proposes what the target holds to be the least likely."""
    draft = copy.deepcopy(target)
    draft.get_output_embeddings().weight.data.neg_()
    return draft


@pytest.mark.parametrize("cache", ["dynamic", "quantized-4"])
def test_a_draft_that_is_never_right_is_left_alone_but_for_probes(cache, monkeypatch):
    depths = plant_costs(monkeypatch, 0.1)
    engine = Engine(target_of("llama"), contrary(target_of("llama")), GROUP, "cpu")
    result = engine.generate(prompt_of("llama"), ADAPTIVE.replace(cache=cache), LONG_TEXT)
    assert result.tokens == one_by_one(target_of("llama"), prompt_of("llama"), cache, 0, LONG_TEXT)
    assert result.accepted == 0
    assert depths[:20].count(8) == TRIES
    assert 3 <= depths[20:].count(PROBE_DEPTH) <= len(depths) // PROBE
    assert depths[20:].count(0) + depths[20:].count(PROBE_DEPTH) == len(depths[20:])
    assert sum(depths) == result.proposed
    assert result.mean_depth == result.proposed / len(depths) < 1


@pytest.mark.parametrize("cache", ["dynamic", "quantized-4"])
def test_a_draft_that_is_always_right_is_believed_to_the_full_depth(cache, monkeypatch):
    depths = plant_costs(monkeypatch, 0.1)
    engine = Engine(target_of("llama"), target_of("llama"), GROUP, "cpu")
    for _ in range(2):  # the second request begins with what the first one learnt
        result = engine.generate(prompt_of("llama"), ADAPTIVE, LONG_TEXT)
    assert result.tokens == one_by_one(target_of("llama"), prompt_of("llama"), "dynamic", 0, LONG_TEXT)
    assert result.accepted == result.proposed
    assert set(depths[-len(result.step_s) : -4]) == {8}
    assert result.mean_depth > 7


@pytest.mark.parametrize("draft", ["prompt-lookup", DRAFT])
@pytest.mark.parametrize("cache", ["dynamic", "static", *QUANTIZED])
def test_whatever_depths_are_chosen_the_text_and_what_the_cache_holds_are_those_of_none(cache, draft, monkeypatch):
    plain = Configuration("fp32", "fp32", cache=cache)
    expected = one_by_one(target_of("qwen3"), prompt_of("qwen3"), cache, 0, LONG_TEXT)
    reference = fresh(engine_of("qwen3"))
    assert reference.generate(prompt_of("qwen3"), plain, LONG_TEXT, keep=400).tokens == expected
    for seed in range(3):
        plant_depths(monkeypatch, seed)
        engine = fresh(engine_of("qwen3"))
        configuration = plain.replace(draft=draft, depth=8, speculation="adaptive")
        result = engine.generate(prompt_of("qwen3"), configuration, LONG_TEXT, keep=400)
        assert result.tokens == expected
        assert_books_balance(result, 8)
        assert len(set(result.step_tokens)) > 1
        ours, theirs = (next(iter(e._recordings.kept.values())).cache for e in (engine, reference))
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert getattr(mine, "stored", 0) == getattr(other, "stored", 0)


# ---- the request's end


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
def test_a_single_new_token_needs_no_step(draft):
    result = run("llama", Configuration("fp32", "fp32", draft=draft, depth=4), 1)
    assert result.tokens == stock_text("llama")[:1]
    assert result.step_s == result.step_tokens == []
    assert result.decode_s == 0


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
@pytest.mark.parametrize("new_tokens", [2, 3, 6, 7])
def test_no_more_tokens_come_than_were_asked_for(draft, new_tokens):
    result = run("gpt-neox", Configuration("fp32", "fp32", draft=draft, depth=4), new_tokens)
    assert result.tokens == stock_text("gpt-neox")[:new_tokens]


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_the_text_ends_at_the_first_stop_token(draft, family):
    text = stock_text(family)
    for index in (0, 3, 10, 25):
        stop = text[index]
        result = run(family, Configuration("fp32", "fp32", draft=draft, depth=7), stop={stop, VOCABULARY + 1})
        assert result.tokens == text[: text.index(stop) + 1]
        assert_books_balance(result, 7)


def test_a_stop_token_within_accepted_tokens_cuts_the_rest():
    engine = Engine(target_of("llama"), target_of("llama"), GROUP, "cpu")
    text = stock_text("llama")
    stop = next(i for i in range(2, 5) if text.index(text[i]) == i)
    configuration = Configuration("fp32", "fp32", draft=DRAFT, depth=7)
    result = engine.generate(prompt_of("llama"), configuration, NEW_TOKENS, stop=[text[stop]])
    assert result.tokens == text[: stop + 1]
    assert result.step_tokens == [stop]


@pytest.mark.parametrize("draft", ["none", DRAFT])
def test_tokens_are_handed_over_as_they_come(draft):
    seen: list[list[int]] = []
    result = run("qwen3", Configuration("fp32", "fp32", draft=draft, depth=4), on_tokens=seen.append)
    assert [len(part) for part in seen] == [1, *result.step_tokens]
    assert [token for part in seen for token in part] == result.tokens


# ---- prefill


@pytest.mark.parametrize(("chunk", "parts"), [(0, [188]), (37, [37] * 5 + [3]), (500, [188])])
def test_the_prompt_is_fed_in_chunks_and_only_its_last_logits_are_computed(chunk, parts, monkeypatch):
    engine = engine_of("qwen3")
    prompt = prompt_of("qwen3")
    assert len(prompt) == sum(parts)
    fed: dict[str, list[tuple[int, int]]] = {"target": [], "draft": []}
    for role, model in (("target", engine.target), ("draft", engine.draft)):
        original = model.forward

        def spy(input_ids: torch.Tensor, original: Any = original, role: str = role, **options: Any) -> Any:
            output = original(input_ids, **options)
            fed[role].append((input_ids.shape[1], output.logits.shape[1]))
            return output

        monkeypatch.setattr(model, "forward", spy)
    engine.generate(prompt, Configuration("fp32", "fp32", draft=DRAFT, depth=4, prefill_chunk=chunk), 12)
    for role in fed:
        assert fed[role][: len(parts)] == [(part, 1) for part in parts]
        assert all(length <= 6 for length, _ in fed[role][len(parts) :])


@pytest.mark.parametrize("cache", ["quantized-2", "quantized-fp8"])
@pytest.mark.parametrize("draft", ["none", DRAFT])
def test_chunks_that_fill_the_window_exactly_are_quantized_before_the_next(cache, draft):
    prompt = tokens(160)
    configuration = Configuration("fp32", "fp32", draft=draft, depth=4, cache=cache, prefill_chunk=32)
    result = engine_of("llama").generate(prompt, configuration, 20)
    assert result.tokens == one_by_one(target_of("llama"), prompt, cache, 32, 20)


def test_a_sliding_cache_is_cut_to_its_window_after_the_prompt():
    prefilled = Runner(target_of("mistral"), "sliding", 400, "cpu", "device")
    prefilled.prefill(tokens(200), 0)
    assert [layer.keys.shape[-2] for layer in prefilled.cache.layers] == [WINDOW - 1] * 2


# ---- scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_logits_of_a_plain_forward_whatever_the_step_and_chunk(family):
    text, continuation = prompt_of(family), tokens(90, seed=5)[:70]
    with torch.inference_mode():
        rows = target_of(family)(torch.tensor([text + continuation])).logits[0, len(text) - 1 : -1]
    caches = [cache for cache in EXACT if cache != "sliding" or family in ("mistral", "gemma3")]
    for cache, step, chunk in itertools.product(caches, (1, 7, 32, 100), (0, 37)):
        own = engine_of(family).score(
            text, continuation, Configuration("fp32", "fp32", cache=cache, prefill_chunk=chunk), step
        )
        assert own.shape == (70, VOCABULARY)
        torch.testing.assert_close(own, rows, atol=1e-4 * rows.abs().max().item(), rtol=0)


@pytest.mark.parametrize("cache", QUANTIZED)
def test_scores_come_through_the_cache_in_use(cache):
    text = plain_text("llama", cache, 37)
    engine = engine_of("llama")
    configuration = Configuration("fp32", "fp32", cache=cache, prefill_chunk=37)
    rows = engine.score(prompt_of("llama"), text, configuration, 1)
    assert rows.argmax(-1).tolist() == text
    exact = engine.score(prompt_of("llama"), text, Configuration("fp32", "fp32"), 1)
    assert (rows[1:] - exact[1:]).abs().amax(-1).min() > 0


def test_quality_falls_with_the_bits_of_the_cache():
    prompt, text, engine = prompt_of("qwen3"), stock_text("qwen3"), engine_of("qwen3")
    reference = [engine.score(prompt, text, Configuration("fp32", "fp32"), 32)]
    divergence = [
        compare([engine.score(prompt, text, Configuration("fp32", "fp32", cache=cache), 32)], reference, [text])
        for cache in ("static", "quantized-8", "quantized-4", "quantized-2")
    ]
    figures = [figure["kl_divergence"] for figure in divergence]
    assert figures == sorted(figures)
    assert figures[0] < 1e-6 < figures[1] * 10 < figures[2] < figures[3]


# ---- conversations


def fresh(engine: Engine) -> Engine:
    """The same models with nothing kept."""
    return Engine(engine.target, engine.draft, engine.group, "cpu")


def converse(
    engine: Engine, prompts: list[list[int]], configuration: Configuration, new_tokens: int = 20, **options: Any
) -> list[int]:
    """Ask prompt after prompt, each behind what was said; how much was cached. Every reply is that of a fresh start."""
    history: list[int] = []
    cached = []
    for prompt in prompts:
        history = [*history, *prompt]
        result = engine.generate(history, configuration, new_tokens, keep=500, **options)
        expected = fresh(engine).generate(history, configuration, new_tokens, **options)
        assert result.tokens == expected.tokens
        assert expected.cached_tokens == 0
        cached.append(result.cached_tokens)
        history += result.tokens
    return cached


CONVERSATION = [tokens(90, seed=3), tokens(15, seed=4), tokens(40, seed=5)]


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
@pytest.mark.parametrize("cache", EXACT[:2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-neox"])
@pytest.mark.parametrize("chunk", [0, 37])
def test_a_turn_prefills_only_what_is_new_and_replies_as_a_fresh_start(family, cache, draft, chunk):
    configuration = Configuration(
        "fp32", "fp32", draft=draft, depth=4 * (draft != "none"), cache=cache, prefill_chunk=chunk
    )
    # the last token of a reply was never fed
    assert converse(fresh(engine_of(family)), CONVERSATION, configuration) == [0, 90 + 19, 90 + 20 + 15 + 19]


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
@pytest.mark.parametrize("cache", QUANTIZED)
def test_a_quantized_cache_goes_on_from_whole_prefill_chunks(cache, draft):
    configuration = Configuration("fp32", "fp32", draft=draft, depth=4 * (draft != "none"), cache=cache)
    assert converse(fresh(engine_of("llama")), CONVERSATION, configuration) == [0, 0, 0]
    chunked = configuration.replace(prefill_chunk=40)
    assert converse(fresh(engine_of("llama")), CONVERSATION, chunked) == [0, 80, 120]


def test_other_prefill_chunks_round_otherwise_and_start_fresh():
    engine, configuration = fresh(engine_of("llama")), Configuration("fp32", "fp32", cache="quantized-4")
    for chunk, cached in ((32, 0), (32, 64), (16, 0), (16, 80)):
        result = engine.generate(CONVERSATION[0], configuration.replace(prefill_chunk=chunk), 20, keep=500)
        assert result.cached_tokens == cached


@pytest.mark.parametrize("draft", ["none", DRAFT])
@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-4"])
def test_sampled_turns_are_those_of_a_fresh_start(cache, draft):
    configuration = Configuration(
        "fp32", "fp32", draft=draft, depth=3 * (draft != "none"), cache=cache, prefill_chunk=40
    )
    cached = converse(fresh(engine_of("qwen3")), CONVERSATION, configuration, sampling=Sampling(1.0, 7))
    assert all(cached[1:])


@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("chunk", [16, 40, 64, 96])
def test_a_cache_that_was_gone_on_from_holds_what_a_fresh_one_holds(cache, chunk):
    """Bit for bit: logits alone would forgive a window that was rounded once too often."""
    configuration = Configuration("fp32", "fp32", draft=DRAFT, depth=4, cache=cache, prefill_chunk=chunk)
    engine, other = fresh(engine_of("qwen3")), fresh(engine_of("qwen3"))
    first = tokens(130, seed=1)
    history = [*first, *engine.generate(first, configuration, 70, keep=500).tokens, *tokens(50, seed=2)]
    result = engine.generate(history, configuration, 30, keep=500)
    assert result.cached_tokens == 129 // chunk * chunk
    assert other.generate(history, configuration, 30, keep=500).cached_tokens == 0
    for place, kept in engine._recordings.kept.items():
        for ours, theirs in zip(kept.cache.layers, other._recordings.kept[place].cache.layers, strict=True):
            assert (ours.stored, ours.recent) == (theirs.stored, theirs.recent)
            assert torch.equal(ours.keys[:, :, : ours.recent], theirs.keys[:, :, : ours.recent])
            assert torch.equal(ours.values[:, :, : ours.recent], theirs.values[:, :, : ours.recent])
            window = ours.keys[:, :, : ours.recent], ours.values[:, :, : ours.recent]
            for mine, fresh_ones in zip(
                ours.read(*window, ours.stored), theirs.read(*window, ours.stored), strict=True
            ):
                assert torch.equal(mine, fresh_ones)


def test_a_sliding_cache_starts_fresh():
    configuration = Configuration("fp32", "fp32", cache="sliding")
    assert converse(fresh(engine_of("mistral")), CONVERSATION, configuration) == [0, 0, 0]


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-4"])
def test_an_edited_history_is_gone_on_from_where_it_is_the_same(cache):
    configuration = Configuration("fp32", "fp32", draft=DRAFT, depth=4, cache=cache, prefill_chunk=32)
    engine, whole = fresh(engine_of("llama")), tokens(120, seed=6)
    edits = [(whole, 0), (whole[:100], 99), (whole[:50] + tokens(30), 50), (tokens(30, seed=9), 0), (whole, 0)]
    for prompt, common in edits:
        result = engine.generate(prompt, configuration, 12, keep=500)
        assert result.tokens == fresh(engine).generate(prompt, configuration, 12).tokens
        assert result.cached_tokens == (common if cache != "quantized-4" else 96 if common == 99 else 0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_prompt_again_feeds_its_last_token(cache):
    engine, configuration = fresh(engine_of("llama")), Configuration("fp32", "fp32", cache=cache)
    texts = [engine.generate(prompt_of("llama"), configuration, 20, keep=500) for _ in range(2)]
    assert texts[0].tokens == texts[1].tokens
    assert texts[1].cached_tokens == len(prompt_of("llama")) - 1


def test_other_settings_go_on_with_the_same_cache_and_another_cache_starts_fresh():
    engine, history = fresh(engine_of("llama")), CONVERSATION[0]
    plain = Configuration("fp32", "fp32")
    steps = [
        (plain, 0),
        (plain.replace(draft=DRAFT, depth=4, prefill_chunk=16), 109),
        (plain.replace(cache="quantized-8", draft=DRAFT, depth=2), 0),
        (plain.replace(draft="prompt-lookup", depth=3), 129),  # the dynamic cache was kept beside it
        (plain.replace(draft=DRAFT, depth=4), 169),
    ]
    for configuration, cached in steps:
        result = engine.generate(history, configuration, 20, keep=500)
        assert result.tokens == fresh(engine).generate(history, configuration, 20).tokens
        assert result.cached_tokens == cached
        history = [*history, *result.tokens]
    engine.recover()
    assert engine.generate(history, plain, 20, keep=500).cached_tokens == 0
    engine.generate(history, plain.replace(cache="static"), 20, keep=500)
    assert [key[0] for _, key in engine._recordings.kept] == ["static"]  # one only from now on


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-4"])
def test_measurements_go_on_from_nothing(cache):
    engine, configuration = fresh(engine_of("llama")), Configuration("fp32", "fp32", cache=cache, prefill_chunk=32)
    engine.generate(CONVERSATION[0], configuration, 20, keep=500)
    assert engine.generate(CONVERSATION[0], configuration, 20).cached_tokens == 0
    assert not engine._recordings.kept
    assert engine.generate(CONVERSATION[0], configuration, 20, keep=500).cached_tokens == 0
    engine.score(CONVERSATION[0], CONVERSATION[1], configuration, 4)
    assert not engine._recordings.kept


def reached(asked: Iterator[int], moment: int) -> bool:
    """Whether this was asked more than `moment` times."""
    return next(asked) >= moment


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-2"])
@pytest.mark.parametrize("draft", ["none", DRAFT])
def test_an_ended_request_can_be_gone_on_from(cache, draft):
    """Ended at each moment that it can be: between chunks of either model, and after each step."""
    configuration = Configuration(
        "fp32", "fp32", draft=draft, depth=3 * (draft != "none"), cache=cache, prefill_chunk=32
    )
    prompt = CONVERSATION[0]
    other = [*prompt[:70], *tokens(60, seed=8)]
    expected = fresh(engine_of("llama")).generate(prompt, configuration, 20).tokens
    for moment, following in itertools.product(range(10), (other, prompt)):
        engine = fresh(engine_of("llama"))
        result = engine.generate(prompt, configuration, 20, keep=500, ended=partial(reached, itertools.count(), moment))
        assert result.tokens == expected[: len(result.tokens)]
        assert bool(result.tokens) == (moment >= 3)  # three chunks
        assert len(result.tokens) < 20
        again = engine.generate(following, configuration, 20, keep=500)
        assert again.tokens == fresh(engine).generate(following, configuration, 20).tokens


def test_a_request_that_fails_leaves_nothing_to_go_on_from(monkeypatch):
    engine, configuration = fresh(engine_of("llama")), Configuration("fp32", "fp32", cache="static")
    expected = engine.generate(CONVERSATION[0], configuration, 20, keep=500).tokens

    def fail(tokens: list[int]) -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        engine.generate([*CONVERSATION[0], 1, 2], configuration, 20, keep=500, on_tokens=fail)
    result = engine.generate(CONVERSATION[0], configuration, 20, keep=500)
    assert (result.tokens, result.cached_tokens) == (expected, 0)


@settings(max_examples=40, derandomize=True)
@given(data=st.data())
def test_any_conversation_is_that_of_fresh_starts(data):
    engine, history = fresh(engine_of("llama")), []
    configuration = Configuration(
        "fp32",
        "fp32",
        cache=data.draw(st.sampled_from(EXACT[:2] + QUANTIZED)),
        draft=data.draw(st.sampled_from(("none", "prompt-lookup", DRAFT))),
        depth=data.draw(st.integers(1, 5)),
        prefill_chunk=data.draw(st.sampled_from((0, 8, 32, 50))),
    )
    if configuration.draft == "none":
        configuration = configuration.replace(depth=0)
    for turn in range(data.draw(st.integers(2, 4))):
        history = history[: len(history) - data.draw(st.integers(0, min(len(history), 60)), label="taken back")]
        history = [*history, *tokens(200, seed=turn)[: data.draw(st.integers(1, 90), label="new")]]
        count = data.draw(st.integers(1, 40), label="new tokens")
        result = engine.generate(history, configuration, count, keep=500)
        assert result.tokens == fresh(engine).generate(history, configuration, count).tokens
        history += result.tokens


# ---- prompt lookup


def lookup(text: list[int], depth: int) -> list[int] | None:
    """What followed the latest earlier occurrence of the longest suffix, by looking everywhere."""
    for size in range(min(NGRAM, len(text)), 0, -1):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[-size:]:
                return text[begin + size : begin + size + depth]
    return None


@settings(max_examples=100, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    steps=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6),
    depth=st.integers(1, 7),
)
def test_prompt_lookup_proposes_what_followed_the_latest_longest_match(prompt, steps, depth):
    drafter = _PromptLookup(prompt, "cpu")
    drafter.start(prompt)
    text: list[int] = []
    for step in steps:
        text += step
        proposal = drafter.propose(text, depth, Sampling(), torch.Generator())
        assert (proposal[0].tolist() if proposal else None) == lookup(prompt + text, depth)


def test_prompt_lookup_pays_on_a_text_that_repeats():
    text = prompt_of("gpt-neox") + stock_text("gpt-neox")
    result = engine_of("gpt-neox").generate(
        text, Configuration("fp32", "fp32", draft="prompt-lookup", depth=4), NEW_TOKENS
    )
    assert result.accepted > 10
    assert result.verifications < NEW_TOKENS


# ---- sampling

SMALL = 4  # tokens of the vocabulary
SEEDS = 800
Verify = Callable[..., tuple[int, list[int]]]


@lru_cache
def small_engine() -> Engine:
    size = {"vocab_size": SMALL, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    target, draft = (tiny("llama", seed, num_key_value_heads=1, **size) for seed in (3, 8))
    return Engine(target, draft, GROUP, "cpu")


SMALL_PROMPT = tokens(12, seed=1, vocabulary=SMALL)


@lru_cache
@torch.inference_mode()
def law() -> torch.Tensor:
    """The exact probabilities of the next three tokens, [SMALL ** 3]."""
    texts = torch.tensor(list(itertools.product(range(SMALL), repeat=3)))
    prompt = torch.tensor(SMALL_PROMPT).expand(len(texts), -1)
    rows = small_engine().target(torch.cat([prompt, texts], dim=1)).logits[:, len(SMALL_PROMPT) - 1 : -1]
    return torch.softmax(rows.double(), -1).gather(2, texts[:, :, None]).prod(1)[:, 0]


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test; cells that expect fewer than five are pooled."""
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum()[None].double()])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(expected) > 2
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2).item()


def sample(draft: str, speculation: str = "constant", seeds: int = SEEDS) -> tuple[float, float]:
    """The test's p-value, and the share of drafted tokens that were accepted."""
    counts, proposed, accepted = torch.zeros(SMALL**3), 0, 0
    configuration, engine = Configuration("fp32", "fp32", draft=draft, depth=2, speculation=speculation), small_engine()
    engine._adaptive.clear()
    for seed in range(seeds):
        result = engine.generate(SMALL_PROMPT, configuration, 4, sampling=Sampling(1.0, seed))
        first, second, third, _ = result.tokens
        counts[(first * SMALL + second) * SMALL + third] += 1
        proposed, accepted = proposed + result.proposed, accepted + result.accepted
    return p_value(counts, law()), accepted / max(proposed, 1)


@pytest.mark.parametrize("draft", ["none", "prompt-lookup", DRAFT])
def test_sampled_text_has_the_distribution_of_the_target(draft):
    value, acceptance = sample(draft)
    assert value > 0.01
    assert acceptance == 0 if draft == "none" else 0.1 < acceptance < 0.9


def plant_fickle_depths(monkeypatch: pytest.MonkeyPatch, draft: str) -> list[int]:
    """Depths that hang on the latest verdicts as much as they can: a memory of three tokens, and dear drafts."""
    monkeypatch.setattr(depth, "MEMORY", 3)
    return plant_costs(monkeypatch, 0.25 if draft == DRAFT else 0.15)


@pytest.mark.parametrize("draft", ["prompt-lookup", DRAFT])
def test_sampled_text_has_the_distribution_of_the_target_where_the_depth_adapts(draft, monkeypatch):
    depths = plant_fickle_depths(monkeypatch, draft)
    value, acceptance = sample(draft, "adaptive")
    assert value > 0.01
    assert 0.1 < acceptance < 0.9
    assert min(depths.count(count) for count in (0, 1, 2)) > SEEDS / 40


def believing(logits: torch.Tensor, drafted: torch.Tensor, *rest: Any) -> tuple[int, list[int]]:
    """Accepts everything."""
    _, own = _verify(logits[-1:], drafted[:0], None, rest[1], rest[2])
    return len(drafted), [*drafted.tolist(), *own]


def forgetful(logits: torch.Tensor, drafted: torch.Tensor, chances: Any, *rest: Any) -> tuple[int, list[int]]:
    """After a rejection it draws from the target's distribution instead of what is left of it."""
    kept, text = _verify(logits, drafted, chances, *rest)
    _, own = _verify(logits[kept : kept + 1], drafted[:0], None, *rest)
    return kept, [*text[:-1], *own]


@pytest.mark.parametrize(("broken", "seeds"), [(believing, SEEDS // 4), (forgetful, SEEDS)])
@pytest.mark.parametrize("draft", ["prompt-lookup", DRAFT])
def test_a_broken_acceptance_rule_is_seen(draft, broken, seeds, monkeypatch):
    monkeypatch.setattr(decode, "_verify", broken)
    value, _ = sample(draft, seeds=seeds)
    assert value < 1e-4


def test_a_broken_acceptance_rule_is_seen_where_the_depth_adapts(monkeypatch):
    monkeypatch.setattr(decode, "_verify", believing)
    plant_fickle_depths(monkeypatch, DRAFT)
    value, _ = sample(DRAFT, "adaptive", SEEDS // 4)
    assert value < 1e-4


@pytest.mark.parametrize("drafted_from_a_model", [True, False])
def test_one_verification_emits_the_law_of_the_target(drafted_from_a_model):
    """Also for distributions that are far apart, and tokens that one of the two never gives."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator) * 2
    logits[0, 1] = logits[1, 3] = -torch.inf
    proposing = torch.softmax(torch.randn(2, 5, generator=generator) * 2, -1)
    proposing[0, 2] = 0
    pairs, first = torch.zeros(5, 5), torch.zeros(5)
    for _ in range(6000):
        if drafted_from_a_model:
            drafted = torch.multinomial(proposing / proposing.sum(-1, keepdim=True), 1, generator=generator)[:, 0]
            _, text = _verify(logits, drafted, proposing / proposing.sum(-1, keepdim=True), Sampling(1.0), generator)
        else:
            _, text = _verify(logits, torch.tensor([0, 4]), None, Sampling(1.0), generator)
        first[text[0]] += 1
        if len(text) > 1:
            pairs[text[0], text[1]] += 1
    wanted = torch.softmax(logits, -1)
    assert p_value(first, wanted[0]) > 0.01
    assert first[1] == 0
    assert p_value(pairs.sum(0), wanted[1]) > 0.01
    assert pairs[:, 3].sum() == 0


@pytest.mark.parametrize("draft", ["none", DRAFT])
def test_a_seed_makes_a_sampled_request_repeatable(draft):
    configuration = Configuration("fp32", "fp32", draft=draft, depth=3)
    texts = [run("llama", configuration, 30, sampling=Sampling(1.0, seed)).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_is_not():
    cold, hot = (run("llama", Configuration("fp32"), sampling=Sampling(heat)).tokens for heat in (1e-3, 5.0))
    assert cold == stock_text("llama")
    assert hot != cold


# ---- what does not fit


def resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model with fewer rows, or with more that are likely tokens."""
    other = copy.deepcopy(model)
    other.resize_token_embeddings(rows, mean_resizing=False)
    more = other.get_output_embeddings().weight[VOCABULARY:]
    more.data.copy_(3 * torch.randn(more.shape, generator=torch.Generator().manual_seed(2)))
    return other.requires_grad_(False)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-4"])
@pytest.mark.parametrize(("ours", "theirs"), [(VOCABULARY, VOCABULARY + 40), (VOCABULARY + 40, VOCABULARY), (89, 30)])
def test_a_draft_with_more_rows_or_fewer_changes_no_text_and_proposes_none_that_one_side_lacks(cache, ours, theirs):
    target, draft = resized(target_of("llama"), ours), resized(draft_of(target_of("llama"), 0.03), theirs)
    engine = Engine(target, draft, GROUP, "cpu")
    proposed: list[int] = []
    propose = decode._ModelDraft.propose

    def seen(self: Any, *arguments: Any) -> Any:
        result = propose(self, *arguments)
        proposed.extend(result[0].tolist())
        assert result[1] is None or result[1].shape[-1] == ours
        return result

    prompt = tokens(70, vocabulary=ours)
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        plain = engine.generate(prompt, Configuration("fp32", "fp32", cache=cache), NEW_TOKENS, sampling=sampling)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode._ModelDraft, "propose", seen)
            drafted = Configuration("fp32", "fp32", draft=DRAFT, depth=4, cache=cache)
            text = engine.generate(prompt, drafted, NEW_TOKENS, sampling=sampling)
        if sampling.temperature == 0:
            assert text.tokens == plain.tokens
            assert len(set(plain.tokens)) > 10
        assert text.proposed > 0
    assert max(proposed) < min(ours, theirs)
    if ours > theirs:
        assert max(prompt) >= theirs  # the draft was shown what it does not have


def test_an_engine_is_loaded_with_its_draft_and_says_where_it_is(tmp_path):
    target_of("llama").save_pretrained(tmp_path / "target")
    draft_of(target_of("llama"), 0.03).save_pretrained(tmp_path / "draft")
    draft = str(tmp_path / "draft")
    phases: list[str] = []
    engine = Engine.load(
        str(tmp_path / "target"), LoadGroup("fp32", "fp32", draft=draft, draft_weights="fp32"), "cpu", phases.append
    )
    assert phases == ["loading the target", "loading the draft", "checking steps through the cache"]
    result = engine.generate(prompt_of("llama"), Configuration("fp32", "fp32", draft=draft, depth=4), NEW_TOKENS)
    assert result.tokens == stock_text("llama")
    assert result.accepted > 0


@pytest.mark.parametrize("draft", ["none", DRAFT])
def test_a_cache_that_does_not_fit_the_model_is_unsupported_by_name(draft):
    with pytest.raises(Unsupported, match="llama has no sliding-window layers"):
        run("llama", Configuration("fp32", "fp32", draft=draft, depth=2, cache="sliding"))


# ---- planted faults


def wrong_output(configuration: Configuration, new_tokens: int = 40) -> str:
    """What the check of the text says about this configuration."""
    worker = Worker(io.StringIO())
    worker.engine = engine_of("llama", configuration.attention)
    prompts = [prompt_of("llama"), tokens(160, seed=9)]
    texts = [worker.engine.generate(prompt, configuration, new_tokens).tokens for prompt in prompts]
    return worker._wrong_output(configuration, 150, prompts, new_tokens, texts)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-4"])
@pytest.mark.parametrize("draft", ["prompt-lookup", DRAFT])
def test_a_cache_that_keeps_rejected_tokens_is_wrong_output(cache, draft, monkeypatch):
    configuration = Configuration("fp32", "fp32", draft=draft, depth=4, cache=cache)
    assert wrong_output(configuration) == ""
    monkeypatch.setattr(runner, "make_cache", lambda word, config, *rest: make_cache(word, config, 999, "cpu"))
    monkeypatch.setattr(runner, "rollback", lambda cache, rejected: None)
    assert "differs from plain decoding at new token" in wrong_output(configuration)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-8"])
def test_a_cache_that_loses_the_last_tokens_is_a_quality_loss(cache, monkeypatch):
    engine, configuration = engine_of("llama"), Configuration("fp32", "fp32", cache=cache)
    prompts = [prompt_of("llama"), tokens(160, seed=9)]
    texts = [engine.generate(prompt, Configuration("fp32", "fp32"), 64).tokens for prompt in prompts]

    def figures(chosen: Configuration) -> dict[str, Any]:
        own = [engine.score(*pair, chosen, 32) for pair in zip(prompts, texts, strict=True)]
        return compare(own, reference, texts)

    reference = [engine.score(*pair, Configuration("fp32", "fp32"), 32) for pair in zip(prompts, texts, strict=True)]
    sound = figures(configuration)
    assert sound["perplexity_ratio"] < 1.05
    assert sound["top1_agreement"] > 0.95

    def lossy(store: Any) -> None:
        settle(store)
        for layer in store.layers:
            end = getattr(layer, "recent", layer.get_seq_length())
            layer.keys[:, :, max(0, end - 8) : end] = 0
            layer.values[:, :, max(0, end - 8) : end] = 0

    monkeypatch.setattr(runner, "settle", lossy)
    faulty = figures(configuration)
    assert faulty["perplexity_ratio_interval"][0] > 1.05
    assert faulty["kl_divergence"] > 100 * max(sound["kl_divergence"], 1e-6)
    assert faulty["top1_agreement"] < sound["top1_agreement"]
