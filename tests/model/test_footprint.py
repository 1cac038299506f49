from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.config import ATTENTIONS, CACHES, LAUNCHES, LM_HEADS, MIB, WEIGHTS, Budget, Configuration
from autotune.model.activations import (
    LOAD_COPIES,
    QUANTIZING_BYTES,
    UNPACKED,
    WORKSPACE,
    _attention_bytes,
    _pass_bytes,
)
from autotune.model.calibration import DEFAULT, Calibration, cheapest, largest_context
from autotune.model.folder import PlanError
from autotune.model.footprint import by_layer
from autotune.model.shape import Linear
from autotune.model.weights import matrix_bytes, quanto_group
from tests.shapes import NF4, SMALL, at, shape_of

GIB = 2**30


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


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys, autotune.model.calibration; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
