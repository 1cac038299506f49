"""Tiny random models of transformers' decoder types: the config of each, and weights that give more than one word."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

VOCABULARY, LAYERS, WINDOW = 96, 4, 16
SPECIAL = 3  # tokens: padding, begin and end
# Sizes by the names that types have for them.
_SIZES = {
    "vocab_size vocab_size_per_layer_input": VOCABULARY,
    "hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width": 64,
    "intermediate_size ffn_dim n_inner dff ffn_hidden_size intermediate_size_mlp dense_intermediate_size": 96,
    "shared_intermediate_size prefix_dense_intermediate_size": 96,
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size shared_experts_intermediate_size": 32,
    "num_hidden_layers n_layer n_layers num_layers": LAYERS,
    "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads": 4,
    "num_key_value_heads swa_num_key_value_heads": 2,
    "head_dim kv_channels swa_head_dim": 16,
    "max_position_embeddings n_positions n_ctx max_seq_len": 256,
    "sliding_window sliding_window_size attention_chunk_size window_size": WINDOW,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 16,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts": 2,
    "n_group topk_group num_expert_group": 1,
    "kv_lora_rank q_lora_rank": 32,
    "qk_nope_head_dim v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads linear_num_heads": 4,
    "linear_key_head_dim linear_value_head_dim linear_head_dim": 16,
    "mamba_n_heads mamba_num_heads": 8,
    "mamba_d_head mamba_head_dim": 16,
    "mamba_d_state ssm_state_size state_size hidden_size_per_layer_input laurel_rank": 8,
    "mamba_n_groups mamba_ngroups": 1,
    "mamba_dt_rank time_step_rank hc_lowrank gated_norm_rank": 4,
    "mamba_chunk_size chunk_size": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {name: value for names, value in _SIZES.items() for name in names.split()}
_WHERE_UNSET = (
    "head_dim",
    "num_key_value_heads",
    "intermediate_size",
    "n_inner",
    "sliding_window",
    "num_experts_per_tok",
)
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
SLIDES = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # of types whose keys and values are one latent
# What is set for a type beside the sizes.
TYPES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": SLIDES,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in SLIDES},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 16, "moe_top_k": 2},
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v32": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "num_key_value_heads": 2, "head_dim": 16},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 24,
        "per_layer_config": {
            layer: {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "head_dim": 24,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
            for layer in ("1", "3")
        },
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "mlp_layer_types": ["dense"]},
    "emu3": {"vocabulary_map": {"<image>": SPECIAL}},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "intermediate_size": [96] * LAYERS,
        "num_kv_shared_layers": 2,
        "layer_types": SLIDES,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {
        "layer_types": SLIDES,
        "num_kv_shared_layers": 2,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hrm_text": {"num_hidden_layers": 2, "num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {
        "layer_types": HYBRID,
        "q_lora_rank": None,
        "linear_attn_config": {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4},
    },
    "laguna": {"layer_types": SLIDES},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": SLIDES},
    "mimo_v2_flash": {"v_head_dim": 8, "layer_types": SLIDES},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "n_groups": 2},
    "olmo_hybrid": {"linear_num_key_heads": 4, "layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2}
_TOWER |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 64}
_TOWER |= {"num_blocks": 1, "nemo_conv_channels": 32, "base_channels": 32, "adapter_out_dim": 64}


def tiny_config(kind: str) -> PreTrainedConfig:
    """The config of a type's tiny model; that of a multimodal type has a tower of one layer beside its text."""
    default = AutoConfig.for_model(kind)
    text = default.get_text_config(decoder=True)
    parts = {name: getattr(default, name) for name in type(default).sub_configs}
    given = {
        name: {"model_type": part.model_type, **(_sizes(part.model_type, part) if part is text else _tower(part))}
        for name, part in parts.items()
        if part is not None
    }
    given |= _sizes(kind, default) if text is default else TYPES.get(kind, {})
    return AutoConfig.for_model(kind, **given)


def _tower(config: PreTrainedConfig) -> dict[str, Any]:
    default = config.to_dict()
    return {name: size for name, size in _TOWER.items() if name in default} | TYPES.get(config.model_type, {})


def _sizes(kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    """What the tiny model of a type has in place of its config's defaults: every kind of layer, in turn."""
    default = config.to_dict()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if default.get(name) is not None or (name in default and name in _WHERE_UNSET)
    }
    sizes |= {name: size for name, size in _LATENT.items() if "kv_lora_rank" in default and name in default}
    for name in _KINDS:
        if default.get(name):
            sizes[name] = (list(dict.fromkeys(default[name])) * LAYERS)[:LAYERS]
    return sizes | TYPES.get(kind, {})


def factory(kind: str) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """What transformers loads a whole checkpoint of the type with."""
    return AutoModelForImageTextToText if kind in MULTIMODAL else AutoModelForCausalLM


def tiny_model(
    kind: str, spread: float = 0.02, gain: float = 1.0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A tiny model with random weights: `spread` is the tables' deviation, `gain` a layer's output's over its input's.

    Nothing that starts as zeros or ones stays so, as a fault in it would not be seen.
    """
    config = tiny_config(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = factory(kind).from_config(config, dtype=dtype).eval()
        tables = {id(model.get_input_embeddings().weight)}
        head = model.get_output_embeddings()
        tables |= {id(head.weight)} if head is not None else set()
        with torch.no_grad():
            for parameter in model.parameters():
                if id(parameter) in tables:
                    parameter.normal_(0, spread)
                elif parameter.ndim < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
                elif parameter.std() < 0.1:  # others mean something, as Mamba's rates of decay
                    parameter.normal_(0, gain / math.sqrt(parameter.shape[-1]))
    return model
