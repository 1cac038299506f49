from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.config import ATTENTIONS, CACHES, LAUNCHES, LM_HEADS, MIB, WEIGHTS, Budget, Configuration, Record
from autotune.model.activations import (
    LOAD_COPIES,
    QUANTIZING_BYTES,
    UNPACKED,
    WORKSPACE,
    _attention_bytes,
    _pass_bytes,
)
from autotune.model.calibration import DEFAULT, SPREAD, Calibration, calibrate, cheapest, largest_context, predict
from autotune.model.folder import PlanError, _header, check_folder
from autotune.model.footprint import Prediction, by_layer
from autotune.model.shape import Linear, ModelShape, read_shape
from autotune.model.weights import matrix_bytes, quanto_group
from tests.shapes import LLAMA_1B, LLAMA_8B, shape_of

GIB = 2**30
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of(tmp_path_factory.mktemp("8b"), LLAMA_8B)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of(tmp_path_factory.mktemp("1b"), LLAMA_1B)


@pytest.fixture(scope="module")
def small_draft(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Llama-3.2-1B."""
    return shape_of(tmp_path_factory.mktemp("1b-tied"), LLAMA_1B | {"head_dim": 64, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    config = LLAMA_1B | {"model_type": "gemma3_text", "sliding_window": 512, "tie_word_embeddings": True}
    return shape_of(tmp_path_factory.mktemp("hybrid"), config)


def at(shape: ModelShape, configuration: Configuration, context: int = 128, **more: Any) -> Prediction:
    arguments = {"new_tokens": 96, "device": "cuda:0", "calibration": DEFAULT["cuda"]} | more
    return predict(shape, arguments.pop("draft", None), configuration, context, **arguments)


# Sizes measured on an H100 (Llama-3-8B's shape, GiB).


@pytest.mark.parametrize(
    ("weights", "lm_head", "measured_gib"),
    [
        ("bnb-nf4", "bf16", 5.31),
        ("bnb-nf4", "nf4", 4.59),
        ("quanto-int4", "bf16", 5.43),
        ("bnb-int8", "bf16", 8.71),
        ("bf16", "bf16", 15.15),
    ],
)
def test_weights_after_loading_are_within_a_hundredth_and_a_half(llama, weights, lm_head, measured_gib):
    owners = at(llama, Configuration(weights=weights, lm_head=lm_head)).owners
    held = owners["weights"] + owners["lm_head"] + owners["embeddings"]
    scratch = LOAD_COPIES.get(weights, 0) * llama.largest_linear * 2  # bnb-int8 only; 8.46 GiB without it
    assert (held + scratch) / GIB == pytest.approx(measured_gib, rel=0.015)


def test_an_int4_head_is_sized_and_expanded_only_where_there_is_no_kernel_for_it(llama):
    head = Configuration(weights="quanto-int4", lm_head="int4", prefill_chunk=64, cache="static")
    assert at(llama, head).owners["lm_head"] == 128256 * 4096 // 2 + 128256 * 4096 // 128 * 4
    matrix = 128256 * 4096 * 2
    assert _pass_bytes(llama, head, 1, 64, True, 1, "cuda") < matrix / 4
    assert _pass_bytes(llama, head, 1, 64, True, 1, "cpu") > matrix


def test_the_embedding_and_the_cache_have_the_published_sizes(llama):
    prediction = at(llama, Configuration(weights="bnb-nf4"))
    assert prediction.owners["embeddings"] / GIB == pytest.approx(0.98, rel=0.01)
    assert prediction.kv_bytes_per_token == 128 * 1024
    assert llama.parameters == 8_030_261_248


NF4 = Configuration(weights="bnb-nf4")
# The engine's own peaks on an H200 (MiB): 8 new tokens, the whole prompt at once, the draft in the target's weights.
PEAKS = [  # weights, cache, context, depth, peak allocated, peak reserved
    ("bf16", "dynamic", 2048, 0, 15894, 15946),
    ("bf16", "static", 8192, 0, 17530, 17882),
    ("bf16", "quantized-4", 16384, 0, 18251, 18664),
    ("bf16", "quantized-8", 16384, 4, 21122, 21620),
    ("bnb-nf4", "dynamic", 2048, 0, 6141, 6196),
    ("bnb-nf4", "dynamic", 16384, 0, 9831, 10334),
    ("bnb-nf4", "static", 8192, 0, 7652, 8034),
    ("bnb-nf4", "static", 16384, 4, 10812, 11850),
    ("bnb-nf4", "quantized-fp8", 8192, 4, 8143, 8458),
    ("quanto-int8", "dynamic", 8192, 0, 10651, 11026),
    ("quanto-int8", "static", 16384, 4, 14039, 14958),
    ("bnb-int8", "dynamic", 16384, 0, 13570, 13828),
    ("bnb-int8", "static", 8192, 0, 11135, 11528),
]


@pytest.mark.parametrize(("weights", "cache", "context", "depth", "allocated", "reserved"), PEAKS)
def test_measured_peaks_are_reproduced(llama, small_draft, weights, cache, context, depth, allocated, reserved):
    drafted = {"draft": "1b", "draft_weights": weights, "depth": depth} if depth else {}
    configuration = Configuration(weights=weights, cache=cache, **drafted)
    prediction = at(llama, configuration, context, new_tokens=8, draft=small_draft)
    held = prediction.total - prediction.owners["base"]
    assert (held - prediction.owners["slack"]) / MIB == pytest.approx(allocated, rel=5e-4)
    assert held / MIB == pytest.approx(reserved, rel=0.01)


# What the engine's operations allocate in the last chunks of a prompt of 16k, beside weights and caches (MiB), counted
# on tensors without data; 32 of it are cuBLAS's workspace.
@pytest.mark.parametrize(("chunk", "counted"), [(256, 86), (512, 108), (1024, 177)])
def test_a_long_prompt_in_chunks_takes_what_its_operations_allocate(llama, chunk, counted):
    configuration = Configuration(weights="quanto-int4", lm_head="int4", embeddings="host", cache="quantized-4")
    configuration = configuration.replace(attention="split_kv", prefill_chunk=chunk, launch="graph")
    prediction = at(llama, configuration, 16384, new_tokens=32)
    assert prediction.owners["activations"] / MIB == pytest.approx(counted, abs=3)


def test_recorded_steps_have_a_pool_that_they_do_not_fill(llama):
    eager = Configuration(cache="static", attention="split_kv")
    slack = [at(llama, eager.replace(launch=launch), 512).owners["slack"] for launch in ("eager", "graph")]
    assert slack[1] - slack[0] == 22 * MIB


def test_loading_is_over_before_there_are_caches(llama):
    quantized = Configuration(weights="quanto-int4", lm_head="int4", embeddings="host", cache="quantized-4")
    short, long = (at(llama, quantized.replace(prefill_chunk=256), context) for context in (128, 1024))
    for prediction in (short, long):
        during = QUANTIZING_BYTES * UNPACKED + WORKSPACE["cuda"]
        assert prediction.owners["kv_cache"] + prediction.owners["activations"] == during


@pytest.mark.parametrize(("cache", "heads"), [("static", 0), ("quantized-4", 2)])
def test_a_prompt_without_a_mask_copies_a_few_heads_at_most(llama, cache, heads):
    configuration = Configuration(cache=cache, attention="split_kv", prefill_chunk=16)
    head = 2 * 128 * 16384 * 2
    assert _attention_bytes(llama, configuration, 16, 16384, True, "cuda") == 3 * heads * head // 2
    in_float32 = _attention_bytes(llama, configuration.replace(weights="fp32"), 16, 16384, True, "cuda")
    assert in_float32 > 4 * head  # which PyTorch needs a mask for, and every head repeated


@pytest.mark.parametrize(("depth", "expanded"), [(6, False), (7, True)])
def test_a_head_in_4_bits_is_expanded_for_eight_tokens(llama, depth, expanded):
    verify = Configuration(lm_head="nf4", draft="prompt-lookup", depth=depth)
    assert (at(llama, verify).owners["activations"] > 128256 * 4096 * 2) is expanded


def test_a_draft_cache_is_made_after_the_prefill_of_the_target(llama, small_draft):
    alone = at(llama, Configuration(), 8192)
    both = at(llama, Configuration(draft="1b", draft_weights="bf16", depth=4), 8192, draft=small_draft)
    assert both.owners["draft_kv_cache"] == pytest.approx(256 * MIB, rel=0.02)
    assert both.owners["activations"] == alone.owners["activations"] - both.owners["draft_kv_cache"]
    recorded = Configuration(draft="1b", draft_weights="bf16", depth=4, cache="static", launch="graph")
    kept = at(llama, recorded, 8192, draft=small_draft)  # from one request to the next, with what it was recorded for
    assert kept.owners["activations"] > alone.owners["activations"]


def test_where_gate_and_up_are_one_product_four_vectors_are_alive(llama):
    vector = 8192 * 14336 * 2
    merged, apart = (at(llama, Configuration(weights=w), 8192).owners["activations"] for w in ("bf16", "quanto-int8"))
    assert merged - apart == vector
    on_cpu = at(llama, Configuration(), 8192, device="cpu").owners["activations"]
    assert merged - on_cpu == vector + WORKSPACE["cuda"]


def test_the_floor_is_bytes_over_bandwidth(llama):
    assert at(llama, NF4).decode_floor_s is None
    floor = at(llama, NF4, 1, new_tokens=1, bandwidth=3.0e12).decode_floor_s
    assert floor == pytest.approx((3.353 + 0.9785) * GIB / 3.0e12, rel=0.001)
    assert at(llama, NF4, 4096, bandwidth=3.0e12).decode_floor_s > floor


# Sizes against the libraries that store them.


def test_a_quantized_matrix_has_the_size_that_bitsandbytes_gives_it():
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("bitsandbytes.nn")
    weight = torch.randn(704, 256, dtype=torch.bfloat16)
    stored = nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = stored.quant_state
    parts = [stored.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    size = sum(part.numel() * part.element_size() for part in parts)
    assert matrix_bytes("bnb-nf4", Linear("", 704, 256, 0), 2) == size


@pytest.mark.parametrize(("inp", "group"), [(4096, 128), (704, 64), (1120, 32), (128, 128), (96, 96), (250, 250)])
def test_the_group_of_a_quanto_matrix_is_the_one_that_quanto_chooses(inp, group):
    torch = pytest.importorskip("torch")
    quanto = pytest.importorskip("optimum.quanto")
    linear = torch.nn.Linear(inp, 8, bias=False, device="meta")
    chosen = quanto.QLinear.qcreate(linear, weights=quanto.qint4, device="meta").weight_group_size
    assert quanto_group(inp) == group == (chosen or inp)


@pytest.mark.parametrize("launch", ["eager", "graph"])
@pytest.mark.parametrize(("head_dim", "context"), [(16, 450), (48, 4500)])
@pytest.mark.parametrize("cache", ["static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8"])
def test_a_cache_has_the_size_that_the_engine_gives_it(tmp_path, cache, head_dim, context, launch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    caches, graph = pytest.importorskip("autotune.engine.cache"), pytest.importorskip("autotune.engine.graph")
    config = SMALL | {"model_type": "llama", "head_dim": head_dim, "dtype": "bfloat16"}
    configuration = Configuration(cache=cache, launch=launch, draft="prompt-lookup", depth=3)
    capacity = context + 96 + 3 + 1  # as the decode loop asks for it
    capacity, spare = (capacity, 0) if launch == "eager" else (graph.bucket(capacity), graph.LONGEST)
    made = caches.make_cache(cache, transformers.AutoConfig.for_model(**config), capacity, "cpu", spare)
    for layer in range(3):
        made.update(*torch.ones(2, 1, 2, 1, head_dim, dtype=torch.bfloat16), layer)
    said = at(shape_of(tmp_path, config), configuration, context)
    assert said.owners["kv_cache"] == caches.stored_bytes(made)


# Families against transformers' own models.


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


# Damaged folders.


def write_safetensors(path: Path, sizes: dict[str, tuple[int, ...]], dtypes: dict[str, str] | None = None) -> None:
    header, end = {}, 0
    for name, size in sizes.items():
        dtype = (dtypes or {}).get(name, "BF16")
        count = 1
        for n in size:
            count *= n
        begin, end = end, end + count * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "num_hidden_layers": 1}))
    write_safetensors(tmp_path / "model.safetensors", {"model.embed_tokens.weight": (320, 64)})
    return tmp_path


def test_a_whole_folder_passes(folder):
    check_folder(folder)


@pytest.mark.parametrize("call", [check_folder, read_shape])
def test_a_missing_folder_or_config_is_named(tmp_path, call):
    with pytest.raises(PlanError, match="nowhere does not exist"):
        call(tmp_path / "nowhere")
    with pytest.raises(PlanError, match=r"no config\.json in"):
        call(tmp_path)


UNUSABLE = [
    json.dumps(SMALL | {"model_type": "gemma2"} | wrong)
    for wrong in (
        {"layer_types": ["full_attention"]},
        {"layer_types": 3},
        {"sliding_window": "all"},
        {"num_key_value_heads": [1, 2, 2]},
        {"num_hidden_layers": 0},
        {"intermediate_size": 1.5},
    )
]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\xff", '{"model_type": "llama", "hidden_size": "4"}', *UNUSABLE]
)
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(PlanError, match=r"config\.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 50, 1000, -1])
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    for call in (check_folder, read_shape):
        with pytest.raises(PlanError, match=r"model\.safetensors is truncated"):
            call(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 30]},
        {"dtype": "BF16", "shape": [-4, -4], "data_offsets": [0, 32]},
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [32, 0]},
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [-32, 0]},
        {"dtype": "BF16", "shape": [4, 4]},
        {"dtype": "BF16", "shape": 4, "data_offsets": [0, 8]},
        {"dtype": [], "shape": [4], "data_offsets": [0, 8]},
        "BF16",
        None,
    ],
)
def test_a_damaged_header_is_refused(folder, entry):
    text = json.dumps({"a.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))
    with pytest.raises(PlanError, match="damaged safetensors header"):
        check_folder(folder)


@settings(max_examples=200)
@given(text=st.binary(max_size=60), length=st.integers(0, 2**64 - 1) | st.integers(0, 70))
def test_any_bytes_are_read_or_refused(tmp_path_factory, text, length):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text)
    with contextlib.suppress(PlanError):
        _header(path)


def test_a_missing_shard_a_missing_tensor_and_a_path_outside_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map, match in [
        ({"model.embed_tokens.weight": "two.safetensors"}, "two.safetensors cannot be read"),
        ({"model.norm.weight": "one.safetensors"}, "no shard holds"),
        ({"model.norm.weight": "../one.safetensors"}, "no weight_map of file names"),
        (None, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(PlanError, match=match):
            check_folder(folder)


def test_pickled_weights_alone_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"no model\.safetensors"):
        check_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PlanError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_folder(folder)


# Properties.

configurations = st.builds(
    Configuration,
    weights=st.sampled_from(WEIGHTS),
    lm_head=st.sampled_from(LM_HEADS),
    embeddings=st.sampled_from(["device", "host"]),
    draft=st.sampled_from(["none", "prompt-lookup", "1b"]),
    draft_weights=st.sampled_from(["none", "bf16", "bnb-nf4"]),
    depth=st.integers(0, 8),
    speculation=st.sampled_from(["constant", "adaptive"]),
    cache=st.sampled_from(CACHES),
    attention=st.sampled_from(ATTENTIONS),
    prefill_chunk=st.sampled_from([0, 64, 1024]),
    launch=st.sampled_from(LAUNCHES),
)
contexts = st.integers(1, 20_000)
devices = st.sampled_from(["cuda:0", "cpu"])
calibrations = st.builds(
    lambda key, share, offset, above: Calibration(500 * MIB, share, {key: (offset, above)}),
    st.sampled_from([*WEIGHTS, ""]),
    st.floats(-0.5, 1),
    st.floats(-1e9, 1e9),
    st.floats(-0.1, 0.5),
)
models = st.sampled_from(["llama", "hybrid"])


def test_an_adaptive_depth_takes_what_the_largest_does_and_the_logits_of_the_smaller_ones(llama, draft):
    for launch, kept in (("eager", 0), ("graph", (1 + 2 + 3 + 5) * 128256 * 2)):
        constant = NF4.replace(cache="static", draft="1b", depth=8, launch=launch)
        first, second = (
            at(llama, configuration, 2048, draft=draft)
            for configuration in (constant, constant.replace(speculation="adaptive"))
        )
        assert second.total - first.total == kept


@settings(max_examples=150)
@given(models, configurations, contexts, st.integers(0, 500), st.integers(1, 200), devices, calibrations)
def test_the_footprint_never_falls_with_context_or_new_tokens(
    llama, hybrid, draft, model, configuration, context, more, new_tokens, device, calibration
):
    shape = {"llama": llama, "hybrid": hybrid}[model]
    common = {"draft": draft, "device": device, "calibration": calibration}
    first = at(shape, configuration, context, new_tokens=new_tokens, **common)
    assert first.total == sum(first.owners.values())
    assert min(first.owners.values()) >= 0
    assert first.host_bytes >= 0
    slack = 8 * len(shape.layers)  # bytes of rounding
    assert at(shape, configuration, context + more, new_tokens=new_tokens, **common).total >= first.total - slack
    assert at(shape, configuration, context, new_tokens=new_tokens + more, **common).total >= first.total - slack


@settings(max_examples=50)
@given(st.sampled_from([w for w in WEIGHTS if w != "fp32"]), st.sampled_from(LM_HEADS[2:]))
def test_quantized_weights_are_never_larger_than_bf16(llama, weights, lm_head):
    plain = at(llama, Configuration()).owners
    quantized = at(llama, Configuration(weights=weights, lm_head=lm_head)).owners
    assert quantized["weights"] <= plain["weights"]
    assert quantized["lm_head"] < plain["lm_head"]


@settings(max_examples=40)
@given(configurations, st.integers(2, 30))
def test_the_largest_context_fits_and_one_token_more_does_not(llama, draft, configuration, gib):
    budget = Budget(gib * GIB, "cuda:0")
    largest = largest_context(llama, draft, configuration, 96, budget, DEFAULT["cuda"])
    if largest:
        assert at(llama, configuration, largest, draft=draft).total <= budget.bytes
    if largest < 131072 - 96:
        assert at(llama, configuration, largest + 1, draft=draft).total > budget.bytes


def test_every_cache_holds_less_than_the_full_one(llama):
    held = {cache: at(llama, Configuration(cache=cache), 8192) for cache in CACHES}
    kv = {cache: prediction.owners["kv_cache"] for cache, prediction in held.items()}
    assert kv["offloaded"] < kv["quantized-2"] < kv["quantized-4"] < kv["quantized-fp8"] < kv["quantized-8"]
    assert kv["quantized-8"] < kv["dynamic"] == kv["sliding"] == kv["static"] - 128 * 1024  # and a slot to spare
    assert held["offloaded"].host_bytes == kv["dynamic"] * 30 // 32


def test_a_quantized_cache_keeps_a_window_however_short_the_prompt_is(llama):
    held = at(llama, Configuration(cache="quantized-4"), 20, new_tokens=4).owners["kv_cache"]
    window = 96 * 128 * 1024
    assert window < held < window + 64 * 128 * 1024 / 2


def test_a_sliding_layer_holds_its_window(hybrid):
    rows = by_layer(hybrid, Configuration(cache="sliding"), 8192, 0)
    assert [row.kv_bytes // (2 * 8 * 256 * 2) for row in rows[:6]] == [512] * 5 + [8192]
    for cache, slots in (("static", 8193), ("dynamic", 8192)):
        rows = by_layer(hybrid, Configuration(cache=cache), 8192, 0)
        assert {row.kv_bytes // (2 * 8 * 256 * 2) for row in rows} == {slots}


def test_a_tied_head_is_shared_until_it_is_stored_otherwise(hybrid):
    matrix = 128256 * 2048 * 2
    owners = at(hybrid, Configuration()).owners
    assert (owners["lm_head"], owners["embeddings"]) == (matrix, 0)
    owners = at(hybrid, Configuration(lm_head="nf4")).owners
    assert owners["lm_head"] < matrix / 3
    assert owners["embeddings"] == matrix
    apart = at(hybrid, Configuration(embeddings="host"))
    assert (apart.owners["lm_head"], apart.owners["embeddings"], apart.host_bytes) == (matrix, 0, matrix)


def test_fp32_doubles_everything_that_bf16_stores(llama):
    half, full = (at(llama, Configuration(weights=w, lm_head=w)).owners for w in ("bf16", "fp32"))
    for owner in ("weights", "lm_head", "embeddings", "kv_cache"):
        assert full[owner] == 2 * half[owner]


def test_layers_sum_to_the_owners(llama):
    rows, owners = by_layer(llama, NF4, 1000, 24), at(llama, NF4, 1000, new_tokens=24).owners
    assert sum(row.weights_bytes for row in rows) == owners["weights"] - 4096 * 2  # the final norm
    assert sum(row.kv_bytes for row in rows) == owners["kv_cache"]


def test_the_cheapest_is_found_and_a_draft_model_needs_its_shape(llama, draft):
    choices = [Configuration(), NF4, NF4.replace(lm_head="nf4"), NF4.replace(draft="1b", depth=3)]
    found = cheapest(llama, {"1b": draft}, choices, [4096, 128], 96, "cuda:0", DEFAULT["cuda"])
    assert found[:2] == (choices[2], 128)
    with pytest.raises(PlanError, match="draft 1b"):
        at(llama, choices[3])


# Calibration.


def record(configuration: Configuration, context: int, peak: float, **more: Any) -> Record:
    arguments = {"outcome": "ok", "peak_bytes": int(peak), "base_bytes": 500 * MIB} | more
    return Record(configuration, context, **arguments)


def test_without_records_the_default_stands():
    assert calibrate([], "cuda:0") == DEFAULT["cuda"]
    lost = record(NF4, 128, 1, outcome="out_of_memory")
    assert calibrate([(lost, Prediction({"base": 0}, 0, 0))], "cpu") == DEFAULT["cpu"]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bnb-nf4", "quanto-int4"]),
            st.sampled_from(CACHES),
            st.integers(64, 16_384),
            st.floats(0.85, 1.2),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_after_calibration_no_record_is_above_its_prediction(llama, seen):
    pairs = []
    for weights, cache, context, factor in seen:
        configuration = Configuration(weights=weights, cache=cache)
        said = at(llama, configuration, context)
        pairs.append((record(configuration, context, said.total * factor), said))
    learned = calibrate(pairs, "cuda:0")
    for measured, _ in pairs:
        said = at(llama, measured.configuration, measured.context_tokens, calibration=learned)
        assert said.total >= measured.peak_bytes


def test_one_high_record_among_many_is_still_covered(llama):
    pairs = [(record(NF4, n, at(llama, NF4, n).total), at(llama, NF4, n)) for n in range(100, 10_100, 100)]
    high = record(NF4, 5000, at(llama, NF4, 5000).total * 1.2)
    learned = calibrate([*pairs, (high, at(llama, NF4, 5000))], "cuda:0")
    assert at(llama, NF4, 5000, calibration=learned).total >= high.peak_bytes


def excess(said: Prediction, offset: float, share: float) -> float:
    """Beyond `said`: 110 MiB less for the base of `record`, `offset` MiB, and a share of cache and activations."""
    moving = sum(said.owners[owner] for owner in ("kv_cache", "draft_kv_cache", "activations"))
    return (offset - 110) * MIB + share * moving


def test_a_steady_excess_is_learned_and_its_error_is_that_of_unseen_records(llama):
    pairs = []
    for context in (128, 512, 2048, 4096, 8192):
        said = at(llama, NF4, context)
        pairs.append((record(NF4, context, said.total + excess(said, 50, 0.1)), said))
    learned = calibrate(pairs, "cuda:0")
    offset, above = learned.corrections["bnb-nf4 eager"]
    assert learned.base_bytes == 500 * MIB
    assert (offset / MIB, learned.share) == pytest.approx((50, 0.1), rel=1e-3)
    assert above == pytest.approx(SPREAD["cuda"], rel=1e-3)  # nothing but the room for the next record
    assert learned.error == pytest.approx(above, rel=1e-3)
    said = at(llama, NF4, 16_384)
    expected = (said.total + excess(said, 50, 0.1)) * (1 + above)
    assert at(llama, NF4, 16_384, calibration=learned).total == pytest.approx(expected, rel=1e-4)


def test_a_record_above_the_others_of_its_kind_raises_the_whole_kind_and_no_other(llama):
    int8 = NF4.replace(weights="quanto-int8")
    contexts = (1024, 2048, 4096, 8192)
    even = [(record(c, n, at(llama, c, n).total - 110 * MIB), at(llama, c, n)) for c in (NF4, int8) for n in contexts]
    high = [(record(NF4, 2048, at(llama, NF4, 2048).total * 1.04 - 110 * MIB), at(llama, NF4, 2048))]
    before, after = (calibrate(pairs, "cuda:0") for pairs in (even, even + high))
    ratios = {
        c.weights: at(llama, c, 4096, calibration=after).total / at(llama, c, 4096, calibration=before).total
        for c in (NF4, int8)
    }
    assert ratios["bnb-nf4"] == pytest.approx(1.04, rel=5e-3)
    assert ratios["quanto-int8"] == pytest.approx(1.0, rel=5e-3)


@pytest.mark.parametrize("more", [{"draft": "1b", "draft_weights": "bf16", "depth": 5}, {"launch": "graph"}])
def test_drafts_and_launches_are_corrected_apart(llama, draft, more):
    static = NF4.replace(cache="static")
    other = static.replace(**more)
    pairs = []
    for context in (128, 1024, 4096):
        for configuration, offset in ((static, 0), (other, 300)):
            said = at(llama, configuration, context, draft=draft)
            pairs.append((record(configuration, context, said.total + excess(said, offset, 0.0)), said))
    learned = calibrate(pairs, "cuda:0")
    for measured, _ in pairs:
        said = at(llama, measured.configuration, measured.context_tokens, calibration=learned, draft=draft)
        assert said.total == pytest.approx(measured.peak_bytes * (1 + SPREAD["cuda"]), rel=1e-4)


def test_kinds_share_a_slope_and_unseen_ones_take_what_is_known_of_their_weights(llama):
    pairs = []
    for weights, offset in (("bnb-nf4", 0), ("bf16", 400)):
        for context in (128, 2048, 8192)[: 1 if weights == "bf16" else 3]:
            configuration = Configuration(weights=weights)
            said = at(llama, configuration, context)
            pairs.append((record(configuration, context, said.total + excess(said, offset, 0.3)), said))
    learned = calibrate(pairs, "cuda:0")
    for configuration in (Configuration(), Configuration(cache="static", launch="graph")):
        said = at(llama, configuration, 16_384)
        expected = (said.total + excess(said, 400, 0.3)) * (1 + SPREAD["cuda"])
        assert at(llama, configuration, 16_384, calibration=learned).total == pytest.approx(expected, rel=1e-4)
    unseen = Configuration(weights="quanto-int4")
    least = at(llama, unseen, 16_384).total + excess(at(llama, unseen, 16_384), 0, 0.3)
    assert at(llama, unseen, 16_384, calibration=learned).total > least


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys, autotune.model.calibration; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
