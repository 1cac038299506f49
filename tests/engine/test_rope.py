"""Rotary factors that depend on the text's length: texts are stock's, whatever the cache, chunks and draft."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from autotune.config import Configuration, LoadGroup
from autotune.engine import graph
from autotune.engine.decode import Engine
from tests.tiny_models import draft_of, tokens

ORIGINAL, NEW_TOKENS = 96, 30
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 1.7, 2.4, 3.1],
    "original_max_position_embeddings": ORIGINAL,
}
SHAPE: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "phi3": Phi3Config(
        **SHAPE, max_position_embeddings=1024, original_max_position_embeddings=ORIGINAL, rope_parameters=LONG
    ),
    "phimoe": PhimoeConfig(
        **SHAPE,
        max_position_embeddings=1024,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={**LONG, "short_mscale": 1.0, "long_mscale": 1.3},
        num_local_experts=2,
    ),
    "llama-longrope": LlamaConfig(**SHAPE, max_position_embeddings=1024, rope_parameters=LONG),
    "llama-dynamic": LlamaConfig(
        **SHAPE,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
}
# within the original length, growing beyond it, beginning at it, and beyond it from the start
PROMPTS = {"within": 60, "growing": 84, "at": ORIGINAL, "beyond": 130}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval().requires_grad_(False)


@cache
def expected(name: str, count: int, of: int | None = None) -> list[int]:
    """What a fresh stock model writes after the first `count` of so many tokens."""
    prompt = torch.tensor([tokens(of or count)[:count]])
    return model_of(name).generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, count:].tolist()


DRAFTINGS = [{}, {"draft": "prompt-lookup", "depth": 4}, {"draft": "a draft", "depth": 4}]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("chunk", "word"), [(0, "dynamic"), (37, "static")])
def test_texts_are_stocks_on_both_sides_of_the_switch_and_across_it(name: str, chunk: int, word: str) -> None:
    target = model_of(name)
    engine = Engine(target, draft_of(target, 0.03), LoadGroup("fp32", "fp32", draft="a draft"), "cpu")
    accepted = 0
    for count in (PROMPTS["beyond"], *PROMPTS.values()):  # nothing stays of a longer text
        for knobs in DRAFTINGS:
            configuration = Configuration("fp32", "fp32", prefill_chunk=chunk, cache=word, **knobs)
            found = engine.generate(tokens(count), configuration, NEW_TOKENS)
            assert found.tokens == expected(name, count), (count, knobs)
            accepted += found.accepted
    assert accepted > 0


def test_the_switch_changes_the_text() -> None:
    for name in ("phi3", "llama-longrope", "llama-dynamic"):
        other = model_of(name)
        engine = Engine(other, None, LoadGroup(), "cpu")
        assert engine.generate(tokens(60), Configuration(), NEW_TOKENS).tokens == expected(name, 60)
        for module in other.modules():
            if hasattr(module, "rope_type"):
                module.rope_type = "default"  # transformers leaves the factors alone
        assert engine.generate(tokens(130), Configuration(), NEW_TOKENS).tokens != expected(name, 130)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "phimoe"])
def test_recorded_steps_and_kept_caches_are_stocks_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    target = model_of(name)
    engine = Engine(target, draft_of(target, 0.03), LoadGroup("fp32", "fp32", draft="a draft"), "cpu")
    for knobs in DRAFTINGS:
        for launch in ("eager", "graph"):
            configuration = Configuration("fp32", "fp32", cache="static", launch=launch, **knobs)
            for count in (84, 130, 90, 60):  # each begins as the one before, but for the newest tokens
                prompt = tokens(150)[:count]
                found = engine.generate(prompt, configuration, NEW_TOKENS, keep=256)
                assert found.tokens == expected(name, count, 150), (count, knobs, launch)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_whole_text(name: str) -> None:
    text = tokens(120)
    whole = model_of(name)(torch.tensor([text[:-1]])).logits[0, 79:]
    engine = Engine(model_of(name), None, LoadGroup(), "cpu")
    for chunk, step in ((0, 1), (32, 8)):
        scored = engine.score(text[:80], text[80:], Configuration(prefill_chunk=chunk), step)
        torch.testing.assert_close(scored, whole, rtol=0, atol=2e-4 * whole.abs().max().item())
