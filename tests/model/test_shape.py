"""Shapes by config.json and by headers, against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.config import LM_HEADS, WEIGHTS, Configuration
from autotune.model.folder import PlanError, check_folder
from autotune.model.shape import Linear, read_shape
from tests.shapes import LLAMA_8B, SMALL, at, shape_of, write_safetensors

FAMILIES: list[dict[str, Any]] = [
    SMALL | {"model_type": "llama"},
    SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    SMALL | {"model_type": "llama", "num_key_value_heads": None, "head_dim": 32},
    SMALL | {"model_type": "mistral", "sliding_window": 32},
    SMALL | {"model_type": "mistral", "sliding_window": None},
    SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    SMALL | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    SMALL | {"model_type": "qwen3", "head_dim": 32},
    SMALL | {"model_type": "gemma", "head_dim": 16},
    SMALL | {"model_type": "gemma2", "sliding_window": 32},
    SMALL | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 32},
    SMALL | {"model_type": "gpt_neox"},
    SMALL | {"model_type": "gpt_neox", "attention_bias": False},
    SMALL | {"model_type": "phi3", "sliding_window": 32, "pad_token_id": 0},
    SMALL | {"model_type": "granite"},
    SMALL | {"model_type": "olmo2", "pad_token_id": 0},
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
def test_formulas_equal_the_model_that_transformers_builds(tmp_path, config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    built = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    shape = shape_of(tmp_path, config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    first = {n.rsplit(".", 1)[1]: size for n, size in linears.items() if ".layers.0." in n}
    assert {linear.name: (linear.out, linear.inp) for linear in shape.layers[0].linears} == first
    cache = transformers.DynamicCache(config=built)
    assert [layer.window for layer in shape.layers] == [getattr(c, "sliding_window", None) for c in cache.layers]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
def test_headers_say_what_the_formulas_say(tmp_path, config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")  # several shards and an index
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    check_folder(tmp_path / "saved")
    read, worked_out = read_shape(tmp_path / "saved"), shape_of(tmp_path, config | {"dtype": "bfloat16"})
    assert read.exact
    assert not worked_out.exact
    for word in WEIGHTS:
        for head in LM_HEADS:
            configuration = Configuration(weights=word, lm_head=head)
            assert at(read, configuration) == at(worked_out, configuration)


def test_an_unknown_family_is_read_from_its_headers_or_refused_by_name(tmp_path):
    config = {"model_type": "novel", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}
    with pytest.raises(PlanError, match="novel"):
        shape_of(tmp_path, config)
    sizes = {"wte.weight": (10, 8), "wpe.weight": (4, 8), "h.0.mlp.w1.weight": (16, 8), "h.0.ln.weight": (8,)}
    write_safetensors(tmp_path / "model.safetensors", sizes)
    shape = read_shape(tmp_path)
    assert shape.tied
    assert shape.parameters == 80 + 32 + 128 + 8
    assert shape.layers[0].linears == (Linear("h.0.mlp.w1.weight", 16, 8, 256),)


def test_a_text_config_is_followed(tmp_path):
    outer = {"model_type": "gemma3", "text_config": LLAMA_8B, "vision_config": {"hidden_size": 9}}
    assert shape_of(tmp_path, outer).parameters == 8_030_261_248


def test_a_checkpoint_counts_as_its_headers_say(tmp_path):
    sizes = {"model.embed_tokens.weight": (320, 64), "lm_head.weight": (320, 64), "model.norm.weight": (64,)}
    config = SMALL | {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "quantization_config": {"quant_method": "gptq", "group_size": 32},
    }
    with pytest.raises(PlanError, match="safetensors"):
        at(shape_of(tmp_path, config), Configuration(weights="checkpoint"))
    stored = {"qweight": (8, 160), "qzeros": (2, 20), "scales": (2, 160), "g_idx": (64,)}
    packed = {f"model.layers.0.mlp.up_proj.{part}": size for part, size in stored.items()}
    dtypes = dict.fromkeys(packed, "I32") | {"model.layers.0.mlp.up_proj.scales": "F16"}
    write_safetensors(tmp_path / "model.safetensors", sizes | packed, dtypes)
    shape = read_shape(tmp_path)
    owners = at(shape, Configuration(weights="checkpoint")).owners
    # a scale and a zero in bf16 per output and group of 32, beside the codes
    assert (owners["weights"], owners["lm_head"]) == (64 * 2 + 64 * 160 // 2 + 2 * 160 * 4, 320 * 64 * 2)
    assert shape.parameters == 2 * 320 * 64 + 64 + 160 * 64
    config["quantization_config"] = {"quant_method": "another"}  # transformers loads it, the headers size it
    owners = at(shape_of(tmp_path, config), Configuration(weights="checkpoint")).owners
    assert owners["weights"] == 64 * 2 + (8 * 160 + 2 * 20 + 64) * 4 + 2 * 160 * 2
