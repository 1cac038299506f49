"""Few tokens' attention on a CPU: the numbers of transformers' own, from rows that share a KV head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from autotune.engine import grouped
from autotune.engine.cache import make_cache, settle
from autotune.engine.load import load_model
from tests.tiny_models import save, tiny, tokens

PROMPT = 70  # longer than the sliding windows of the models that have one


@torch.inference_mode()
def logits(model: PreTrainedModel, cache: str, steps: tuple[int, ...]) -> torch.Tensor:
    """Of a prompt and then of steps of so many tokens."""
    text = torch.tensor(tokens(PROMPT + sum(steps)))
    store = make_cache(cache, model.config, 200, "cpu")
    rows = []
    for part in text.split([PROMPT, *steps]):
        rows.append(model(part[None], past_key_values=store).logits[0])
        settle(store)
    return torch.cat(rows)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized-8"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_the_logits_are_those_of_the_attention_that_it_stands_for(family, attention, cache):
    model = tiny(family)
    model.set_attn_implementation(attention)
    steps = (1, 5, 2, 1, 40)
    expected = logits(model, cache, steps)
    grouped.use_grouped(model)
    assert model.config._attn_implementation == grouped.WORDS[attention]
    torch.testing.assert_close(logits(model, cache, steps), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("new", "rows"), [(1, 2), (5, 10), (grouped.FEW, 2 * grouped.FEW)])
@pytest.mark.parametrize("heads", [4, 2])  # with two KV heads, a lone row is doubled
def test_a_key_is_multiplied_once_with_the_rows_of_all_its_heads(heads, new, rows, monkeypatch):
    seen: list[tuple[int, ...]] = []
    attention = functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.extend([tuple(query.shape), tuple(key.shape)])
        return attention(query, key, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    model = tiny("llama", num_attention_heads=heads)
    grouped.use_grouped(model)
    logits(model, "static", (new,))
    rows = rows if heads == 4 else max(2, new)
    assert seen[-2:] == [(1, 2, rows, 32 // heads), (1, 2, PROMPT + new, 32 // heads)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_is_attended_to_by_transformers_own_function(attention):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    expected = logits(model, "dynamic", (grouped.FEW + 1,))
    grouped.use_grouped(model)
    assert torch.equal(logits(model, "dynamic", (grouped.FEW + 1,)), expected)


def test_eager_attention_repeats_no_keys_and_leaves_the_module_as_it_was(monkeypatch):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    grouped.use_grouped(model)
    own, groups = grouped._own, []

    def spy(module: torch.nn.Module) -> Any:
        def call(module: Any, query: torch.Tensor, *args: Any, **options: Any) -> Any:
            groups.append((module.num_key_value_groups, query.shape[1]))
            return own(module)(module, query, *args, **options)

        return call

    monkeypatch.setattr(grouped, "_own", spy)
    logits(model, "dynamic", (3,))
    assert groups == [(2, 4), (2, 4), (1, 2), (1, 2)]
    assert {module.num_key_value_groups for module in model.modules() if hasattr(module, "num_key_value_groups")} == {2}


@pytest.mark.parametrize(
    ("family", "weights", "attention", "word"),
    [
        ("llama", "bf16", "sdpa", "grouped_sdpa"),
        ("llama", "bf16", "eager", "grouped_eager"),
        ("llama", "fp32", "sdpa", "sdpa"),  # there nothing is gained, and the bits stay transformers'
        ("gpt-neox", "bf16", "sdpa", "sdpa"),  # no heads share keys
    ],
)
def test_what_loads_in_bfloat16_on_a_cpu_uses_it(tmp_path, family, weights, attention, word):
    model = load_model(save(tiny(family), tmp_path), weights=weights, lm_head=weights, attention=attention)
    assert model.config._attn_implementation == word
