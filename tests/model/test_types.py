"""The plan of a tiny model of many types, beside what the stock model and its cache really hold."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from autotune.cli import main
from autotune.config import Configuration
from autotune.engine.load import load_model
from autotune.engine.load.quantize import check_linear
from autotune.engine.support import Unsupported
from autotune.model.calibration import DEFAULT, predict
from autotune.model.folder import PlanError
from autotune.model.footprint import by_layer
from autotune.model.refused import check_type, word_refusals
from autotune.model.shape import ModelShape, read_shape

TOKENS = 24
BF16 = Configuration(weights="bf16", lm_head="bf16")
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
INDEX = {"index_head_dim": 16, "index_n_heads": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
OLD = {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_inner": 96, "n_positions": 128}
SLIDES = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2

# What is set for each type beside BASE, which a type ignores where it has other names for a size.
TYPES: dict[str, dict[str, Any]] = {
    # sizes under other names
    "gpt2": OLD,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 4, "ffn_dim": 96},
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "num_kv_shared_layers": 2,
        "layer_types": SLIDES,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "laurel_rank": 8,
    },
    "hrm_text": {"num_hidden_layers": 2, "num_key_value_heads": 4},
    # caches of other sizes
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "gpt_bigcode": {**OLD, "multi_query": True},
    "deepseek_v3": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "minicpm3": LATENT,
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "deepseek_v32": {**LATENT, **EXPERTS, **INDEX, "index_topk": 8, "first_k_dense_replace": 1},
    "qwen4_exp_text": {
        **{**DELTA, **EXPERTS},
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "gemma4_text": {
        "layer_types": SLIDES,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "mimo_v2_flash": {**EXPERTS, "n_routed_experts": 4, "v_head_dim": 8, "layer_types": SLIDES},
    "gpt_oss": {**EXPERTS, "layer_types": SLIDES},
    "qwen3_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # states
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32, "layer_types": HYBRID},
    "qwen3_5_text": {**DELTA, "layer_types": HYBRID},
    "kimi_linear": {
        **LATENT,
        **EXPERTS,
        "layer_types": HYBRID,
        "q_lora_rank": None,
        "linear_attn_config": {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {**MAMBA, **EXPERTS, "shared_intermediate_size": 32, "layer_types": HYBRID},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4, "layer_types": HYBRID},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2}
TOWER |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 64}
WRAPPERS: dict[str, dict[str, Any]] = {"qwen3_5": TYPES["qwen3_5_text"], "gemma3": {"layer_types": SLIDES}}
WRAPPERS |= {"mllama": {"cross_attention_layers": [1, 3]}, "llama4": {**EXPERTS, "layer_types": None}}


def _saved(kind: str, folder: Path) -> PreTrainedModel:
    """A tiny model in bf16, as AutoModelForCausalLM makes it, and its checkpoint in the folder."""
    known = set(AutoConfig.for_model(kind).to_dict()) | {"num_hidden_layers", "per_layer_config", "attn_layer_indices"}
    if kind in ("nemotron_h", "longcat_flash"):  # which make it of another
        known -= {"num_hidden_layers"}
    sizes = {name: value for name, value in BASE.items() if name in known} | TYPES[kind]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.eval()


def _wrapped(kind: str, folder: Path) -> PreTrainedModel:
    text = BASE | WRAPPERS[kind]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=TOWER)
    with torch.random.fork_rng():
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_model(folder, weights="bf16", lm_head="bf16", attention="sdpa", device="cpu")


def _held(model: PreTrainedModel) -> int:
    """Bytes of what the cache holds after TOKENS tokens."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    taken = inspect.signature(model.forward).parameters
    word = "cache_params" if "cache_params" in taken else "past_key_values"
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + TOKENS)[None], use_cache=True, **{word: cache})
    # positions, which qwen4_exp has the first layer hold, are 24 bytes a token in all
    held = [value for layer in cache.layers for name, value in vars(layer).items() if name != "indexer_position_ids"]
    held += [state for states in held if isinstance(states, dict) for state in states.values()]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor) and tensor.ndim > 1)


def _weights(shape: ModelShape) -> int:
    owners = predict(shape, None, BF16, TOKENS, 1, "cpu", DEFAULT["cpu"]).owners
    return owners["weights"] + owners["lm_head"] + owners["embeddings"]


def _left(refused: dict[str, dict[str, str]]) -> int:
    """The per cent of the weights that 4 bits would leave as they are, as a refusal of them says it; 0 for none."""
    return _share(refused["weights"]["quanto-int4"]) if "weights" in refused else 0


def _left_by_the_engine(model: PreTrainedModel) -> int:
    try:
        check_linear(model, "quanto-int4")
    except Unsupported as error:
        return _share(str(error))
    return 0


def _share(message: str) -> int:
    return int(message.partition("%")[0].split()[-1])


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_planned_with_the_bytes_that_it_holds(kind, tmp_path):
    model = _saved(kind, tmp_path)
    check_type(tmp_path)
    shape = read_shape(tmp_path)
    assert _weights(shape) == pytest.approx(sum(2 * p.numel() for p in model.parameters()), rel=0.01)
    kept = sum(row.kv_bytes for row in by_layer(shape, BF16, TOKENS, 0))
    assert kept == _held(model)
    # a router is a linear layer of some types and not of others
    assert _left(word_refusals(shape)) == pytest.approx(_left_by_the_engine(model), abs=1)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_multimodal_type_is_planned_with_what_the_engine_loads(kind, tmp_path):
    model = _wrapped(kind, tmp_path)
    shape = read_shape(tmp_path)
    assert _weights(shape) == pytest.approx(sum(2 * p.numel() for p in model.parameters()), rel=0.01)
    assert sum(row.kv_bytes for row in by_layer(shape, BF16, TOKENS, 0)) == _held(model)


def _shape(kind: str, folder: Path) -> ModelShape:
    _saved(kind, folder)
    return read_shape(folder)


def test_a_layer_tells_what_it_keeps(tmp_path):
    keys = 2 * 2 * 16
    layers = _shape("nemotron_h", tmp_path).layers
    assert [layer.kv_elements for layer in layers] == [0, 0, keys, 0]
    conv = (8 * 16 + 2 * 2 * 8) * 4  # channels of the inner width and of two groups' B and C, by the kernel
    assert [(layer.conv_elements, layer.recurrent_elements) for layer in layers] == [(conv, 8 * 16 * 8), *[(0, 0)] * 3]


def test_a_state_is_kept_twice_while_tokens_are_proposed_and_does_not_grow(tmp_path):
    shape = _shape("mamba2", tmp_path)
    plain = sum(row.kv_bytes for row in by_layer(shape, BF16, 1000, 0))
    assert plain == sum(row.kv_bytes for row in by_layer(shape, BF16, 10, 0)) > 0
    proposed = BF16.replace(draft="prompt-lookup", depth=4)
    assert sum(row.kv_bytes for row in by_layer(shape, proposed, 10, 0)) == 2 * plain


def test_a_shared_layer_has_no_keys_in_memory_though_the_file_may_have_them(tmp_path):
    model = _saved("gemma4_text", tmp_path)
    shape = read_shape(tmp_path)
    assert [layer.head_dims for layer in shape.layers[:2]] == [(16, 16), (32, 32)]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for part in ("k_proj", "v_proj"):
        tensors[f"model.layers.3.self_attn.{part}.weight"] = torch.zeros(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_shape(tmp_path) == shape


def test_words_that_a_model_cannot_run_are_refused_with_their_reason(tmp_path):
    refused = {}
    for kind in ("deepseek_v3", "gemma4_text", "gpt_oss", "qwen3_5_text"):
        (tmp_path / kind).mkdir()
        refused[kind] = word_refusals(_shape(kind, tmp_path / kind))
    assert refused["deepseek_v3"]["cache"] == {}
    assert "values of one size" in refused["deepseek_v3"]["attention"]["split_kv"]
    assert "of another layer" in refused["gemma4_text"]["attention"]["split_kv"]
    assert "sinks" in refused["gpt_oss"]["attention"]["split_kv"]
    assert refused["qwen3_5_text"] == {"cache": {}, "attention": {}}


def test_the_plan_says_what_it_leaves_out_and_refuses_what_cannot_run(tmp_path):
    words = ["plan", "--model", str(tmp_path), "--budget", "1GB", "--device", "cpu", "--contexts", "64"]
    words += ["--new-tokens", "8"]
    _saved("deepseek_v3", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 0, made.output
    said = " ".join(made.output.split())
    assert "Left out: attention = split_kv: it needs keys and values of one size." in said
    assert "quanto-int4 weights" not in said
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "rwkv"}))
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 2
    assert "cannot run here" in made.output


@pytest.mark.parametrize("kind", ["rwkv", "xlstm", "reformer", "openai-gpt", "recurrent_gemma", "minimax"])
def test_a_type_whose_steps_cannot_be_taken_one_by_one_is_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(PlanError, match=rf"model_type = {kind}.*cannot run here"):
        check_type(tmp_path)


def test_compressed_attention_is_refused_by_its_kind_or_by_its_tensors(tmp_path):
    config = {"model_type": "deepseek_v4", "layer_types": ["compressed_sparse_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="compressed_sparse_attention layers"):
        check_type(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    save_file({"model.layers.0.self_attn.compressor.wk.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="sparse attention layers"):
        check_type(tmp_path)


def test_what_a_checkpoint_holds_and_transformers_does_not_load_is_not_planned(tmp_path):
    model = _saved("gpt2", tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    before = _weights(read_shape(tmp_path))
    for name in ("transformer.h.0.attn.bias", "mtp.fc.weight", "transformer.h.4.mlp.c_fc.weight"):
        tensors[name] = torch.zeros(1, 1, 64, 64) if name.endswith("bias") else torch.zeros(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    assert _weights(read_shape(tmp_path)) == before
