"""The plan of a tiny model of many types, beside what the stock model and its cache really hold."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

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
from benchmarks.tiny_types import tiny_model

TOKENS = 12  # fewer than the sliding windows have, behind which the stock cache would let go of them
BF16 = Configuration(weights="bf16", lm_head="bf16")
# sizes under other names; caches of other sizes; states
NAMED = ["gpt2", "gpt_neo", "mpt", "xglm", "jetmoe", "gemma3n_text", "hrm_text"]
CACHED = ["falcon", "gpt_bigcode", "deepseek_v3", "minicpm3", "longcat_flash", "deepseek_v32", "qwen4_exp_text"]
CACHED += ["gemma4_text", "mimo_v2_flash", "gpt_oss", "qwen3_moe", "dbrx"]
STATES = ["qwen3_next", "qwen3_5_text", "kimi_linear", "lfm2", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h"]
STATES += ["olmo_hybrid", "mamba2", "mamba", "jamba"]
MULTIMODAL = ["qwen3_5", "gemma3", "mllama", "llama4"]


def _saved(kind: str, folder: Path) -> PreTrainedModel:
    """A tiny model in bf16, and its checkpoint in the folder."""
    model = tiny_model(kind, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


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


@pytest.mark.parametrize("kind", [*NAMED, *CACHED, *STATES])
def test_a_type_is_planned_with_the_bytes_that_it_holds(kind, tmp_path):
    model = _saved(kind, tmp_path)
    check_type(tmp_path)
    shape = read_shape(tmp_path)
    assert _weights(shape) == pytest.approx(sum(2 * p.numel() for p in model.parameters()), rel=0.01)
    kept = sum(row.kv_bytes for row in by_layer(shape, BF16, TOKENS, 0))
    assert kept == _held(model)
    # a router is a linear layer of some types and not of others
    assert _left(word_refusals(shape)) == pytest.approx(_left_by_the_engine(model), abs=1)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_type_is_planned_with_what_the_engine_loads(kind, tmp_path):
    _saved(kind, tmp_path)
    model = load_model(tmp_path, weights="bf16", lm_head="bf16", attention="sdpa", device="cpu")
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
