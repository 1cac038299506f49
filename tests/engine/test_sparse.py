"""Attention over a latent, and over the tokens that an index chooses: stock's text with every cache and knob."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config

from autotune.config import Configuration, LoadGroup
from autotune.engine.cache import QuantizedLayer
from autotune.engine.decode import Engine
from autotune.engine.graph import StepRunner
from autotune.engine.runner import Runner
from tests.tiny_models import VOCABULARY, draft_of, tokens

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_INDEX = {"index_head_dim": 16, "index_n_heads": 2}
CONFIGS = {
    "latent": DeepseekV3Config(**_SIZES),
    "all are seen": DeepseekV32Config(**_SIZES, **_INDEX, index_topk=256),
    "few are chosen": DeepseekV32Config(**_SIZES, **_INDEX, index_topk=48),
}
GROUP = LoadGroup(weights="fp32", lm_head="fp32")
PROMPT, NEW = 40, 24  # the index of the last model begins to choose on the way
CHOICES = [
    {},
    {"cache": "static"},
    {"prefill_chunk": 16},
    {"draft": "prompt-lookup", "depth": 3},
    {"draft": "prompt-lookup", "depth": 3, "cache": "static"},
    {"draft": "a model", "depth": 3, "draft_weights": "fp32"},
    {"draft": "a model", "depth": 3, "draft_weights": "fp32", "cache": "static"},
]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    made.generation_config.eos_token_id = None
    return made


def generate(model, prompt, words, keep=0, engine=None, new=NEW):
    draft = draft_of(model, 0.05) if words.get("draft") == "a model" else None
    engine = engine or Engine(model, draft, GROUP, "cpu")
    return engine.generate(prompt, Configuration(weights="fp32", lm_head="fp32", **words), new, keep=keep)


@pytest.mark.parametrize("words", CHOICES, ids=lambda words: " ".join(map(str, words.values())) or "dynamic")
def test_the_text_is_that_of_stock_decoding_without_speculation(model, words):
    asked = torch.tensor([tokens(PROMPT)])
    said = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False)
    done = generate(model, tokens(PROMPT), words)
    assert done.tokens == said[0, PROMPT:].tolist()
    if words.get("draft") == "a model":
        assert 0 < done.accepted < done.proposed  # what was rejected has been rolled back


@pytest.mark.parametrize("word", ["quantized-8", "quantized-4", "quantized-2", "quantized-fp8"])
def test_a_quantized_cache_gives_one_text_with_speculation_and_without(model, word):
    prompt = tokens(150)
    plain = generate(model, prompt, {"cache": word})
    for words in ({"draft": "prompt-lookup", "depth": 3}, {"draft": "a model", "depth": 3, "draft_weights": "fp32"}):
        assert generate(model, prompt, {"cache": word, **words}).tokens == plain.tokens
    exact, stored = (Runner(model, each, 200, "cpu", "device") for each in ("dynamic", word))
    for runner in (exact, stored):
        runner.prefill(prompt, 0)
    assert all(isinstance(layer, QuantizedLayer) and layer.stored >= 64 for layer in stored.cache.layers)
    after = [runner.feed(torch.tensor(tokens(1, 1))) for runner in (exact, stored)]
    assert (after[0] - after[1]).abs().max() > 0


@pytest.mark.parametrize("word", ["static", "quantized-8"])
def test_recorded_steps_say_what_eager_ones_do(model, word):
    """On a CPU they run without a recording, with their lengths in tensors and every slot to be masked."""
    key = (word, "graph", "sdpa", 256)
    recorded, eager = StepRunner(model, key, "cpu", "device"), Runner(model, word, 256, "cpu", "device")
    recorded.start((1, 4))
    for runner in (recorded, eager):
        runner.prefill(tokens(20), 0)
    for step in ([3], [5, 7, 11, 13], [17]):
        said = [runner.feed(torch.tensor(step)) for runner in (recorded, eager)]
        torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-4)
        for runner in (recorded, eager):
            runner.rollback(len(step) // 2)


def test_a_conversation_with_a_quantized_cache_goes_on_from_its_mark(model):
    engine, words = Engine(model, None, GROUP, "cpu"), {"cache": "quantized-8", "prefill_chunk": 64}
    first, cached = tokens(200), []
    said = generate(model, first, words, 300, engine, 6).tokens
    for prompt in (first + said + tokens(4, 1), first + tokens(9, 2)):
        done = generate(model, prompt, words, 300, engine, 6)
        cached.append(done.cached_tokens)
        assert done.tokens == generate(model, prompt, words, new=6).tokens
    assert (max(cached) > 0) == (getattr(model.config, "index_topk", 256) > 200)


def test_a_conversation_says_what_fresh_starts_do(model):
    engine = Engine(model, None, GROUP, "cpu")
    first = tokens(30)
    said = generate(model, first, {}, 200, engine, 6).tokens
    for prompt in (first + said + tokens(4, 1), first + tokens(4, 2), first + said + tokens(30, 3)):
        done = generate(model, prompt, {}, 200, engine, 6)
        assert done.tokens == generate(model, prompt, {}, new=6).tokens
        longest = getattr(model.config, "index_topk", 256)
        assert (done.cached_tokens > 0) == (len(prompt) <= longest)
