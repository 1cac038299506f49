"""Merged projections and 4-bit weights compute what the separate layers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPTJConfig,
    GPTNeoConfig,
    JambaConfig,
    OPTConfig,
    XGLMConfig,
)

from autotune.config import Configuration, LoadGroup
from autotune.engine.decode import Engine
from autotune.engine.linear import Merged, Slice, read_directly, siblings
from autotune.engine.load import load_model
from tests.tiny_models import PROMPT, make_model

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(("name", "layers"), [("llama", 10), ("qwen3", 10), ("gpt-neox", 0)])
def test_projections_of_the_same_input_are_found(name: str, layers: int) -> None:
    assert len(siblings(make_model(name))) == layers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_merged_projections_give_the_same_text(tmp_path: Path, name: str) -> None:
    make_model(name).save_pretrained(tmp_path)
    texts = []
    for merge in (False, True):
        model = load_model(tmp_path, weights="fp32", lm_head="fp32", merge=merge)
        assert any(isinstance(module, Slice) for module in model.modules()) == (merge and name != "gpt-neox")
        engine = Engine(model, None, LoadGroup(), "cpu")
        texts.append(engine.generate(PROMPT, Configuration(), 40).tokens)
    assert len(set(texts[0])) > 5
    assert texts[0] == texts[1]


OTHER_ORDERS = {
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256),
    "biogpt": BioGptConfig(**SMALL, intermediate_size=48, max_position_embeddings=256),
    "gpt_neo": GPTNeoConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "gptj": GPTJConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
    "xglm": XGLMConfig(vocab_size=60, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48),
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_projections_are_merged_in_whatever_order_the_model_has_them(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    attention = "eager" if name in ("gpt_neo", "gptj", "xglm") else "sdpa"
    stock = AutoModelForCausalLM.from_config(OTHER_ORDERS[name], attn_implementation=attention).eval()
    for parameter in stock.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path, weights="fp32", lm_head="fp32", attention=attention, merge=True)
    assert sum(isinstance(module, Slice) for module in model.modules()) >= 6
    ids = torch.tensor([PROMPT[:20]])
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_the_models_code_reads_itself_are_found() -> None:
    small = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    jamba = AutoModelForCausalLM.from_config(
        JambaConfig(**small, num_attention_heads=4, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False)
    )
    assert {name.rpartition(".")[2] for name in read_directly(jamba)} == {"dt_proj"}
    assert not read_directly(make_model("llama"))


def test_weights_without_a_product_for_few_tokens_are_not_merged(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, weights="quanto-int8", lm_head="fp32", merge=True)
    assert not any(isinstance(module, Slice) for module in model.modules())


def test_a_merged_product_is_computed_once_and_let_go() -> None:
    calls = []
    linear = torch.nn.Linear(4, 6)
    linear.register_forward_hook(lambda *_: calls.append(1))
    merged = Merged(linear, [1, 2, 3])
    slices = [Slice(merged, index) for index in range(3)]
    for _ in range(2):
        states = torch.randn(1, 5, 4)
        whole = torch.cat([part(states) for part in slices], dim=-1)
        torch.testing.assert_close(whole, torch.nn.functional.linear(states, linear.weight, linear.bias))
        assert merged.input is None
        assert merged.outputs == [None] * 3
    assert len(calls) == 2


def test_a_slice_that_is_called_with_another_input_computes_its_own() -> None:
    linear = torch.nn.Linear(4, 6)
    merged = Merged(linear, [2, 4])
    first, second = torch.randn(2, 1, 3, 4)
    Slice(merged, 0)(first)
    torch.testing.assert_close(Slice(merged, 1)(second), linear(second)[..., 2:])
    torch.testing.assert_close(Slice(merged, 0)(first), linear(first)[..., :2])
