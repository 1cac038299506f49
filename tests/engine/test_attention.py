# ruff: noqa: E402 - the interpreter must be asked for before the kernels are defined
"""The split-KV kernel against the dequantizing path, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from transformers.masking_utils import sliding_window_causal_mask_function

from autotune.config import Configuration, LoadGroup
from autotune.engine import attention, graph
from autotune.engine.cache import Lengths, make_cache, settle, stored_tokens
from autotune.engine.decode import Engine
from autotune.engine.load import load_model
from autotune.engine.support import Unsupported
from tests.tiny_models import PROMPT, make_model

CACHES = ("static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "COPIED_BY_QUERIES", 0)
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "PROGRAMS", 6)
        monkeypatch.setattr(attention, "LONG_PROGRAMS", 6)


def one_layer(cache: str, capacity: int) -> Any:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=1))
    return make_cache(cache, config, capacity, DEVICE, spare=32)


@pytest.mark.parametrize("cache", [*CACHES, "quantized-4 and long"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "held", "count", "window"),
    [
        (8, 2, 64, 300, 1, None),  # grouped queries
        (4, 4, 32, 129, 5, None),  # several tokens, causal among themselves
        (4, 2, 16, 129, 2, None),  # half of it is less than a product takes
        (8, 2, 24, 300, 3, 100),  # a size that is no power of two, and a sliding window
        (8, 2, 128, 20, 8, None),  # nothing is in groups yet
        (8, 2, 128, 300, 5, None),  # two groups of a value, and more rows than a program takes
    ],
)
def test_the_kernel_reads_what_the_cache_would_dequantize(
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    heads: int,
    kv_heads: int,
    dim: int,
    held: int,
    count: int,
    window: int | None,
) -> None:
    torch.manual_seed(0)
    cache, _, long = cache.partition(" and ")
    monkeypatch.setattr(attention, "LONG", 0 if long else 512)
    whole = one_layer(cache, 512)
    layer = whole.layers[0]
    keys, values = torch.randn(2, 1, kv_heads, held + count, dim, device=DEVICE)
    layer.update(keys[:, :, :held], values[:, :, :held])
    settle(whole)
    layer.lengths = Lengths(
        torch.tensor([held], device=DEVICE), torch.tensor([stored_tokens(whole)], device=DEVICE), read=True
    )
    read_keys, read_values = layer.update(keys[:, :, held:], values[:, :, held:])
    query = torch.randn(1, count, heads, dim, device=DEVICE).transpose(1, 2)
    position = held + torch.arange(count, device=DEVICE)[:, None]
    slot = torch.arange(read_keys.shape[2], device=DEVICE)[None]
    mask = (slot <= position) & (slot > position - (window or 10**6))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        read_keys.repeat_interleave(heads // kv_heads, 1),
        read_values.repeat_interleave(heads // kv_heads, 1),
        attn_mask=mask,
    )
    got = attention.decode_attention(query, layer, window=window)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["static", "quantized-4"])
def test_queries_that_do_not_fit_one_launch_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    torch.manual_seed(0)
    whole = one_layer(cache, 256)
    layer = whole.layers[0]
    keys, values = torch.randn(2, 1, 2, 105, 16, device=DEVICE)
    layer.update(keys[:, :, :100], values[:, :, :100])
    settle(whole)
    stored = torch.tensor([stored_tokens(whole)], device=DEVICE)
    layer.lengths = Lengths(torch.tensor([100], device=DEVICE), stored, read=False)
    layer.update(keys[:, :, 100:], values[:, :, 100:])
    query = torch.randn(1, 5, 8, 16, device=DEVICE).transpose(1, 2)
    at_once = attention.decode_attention(query, layer)
    monkeypatch.setattr(attention, "WIDE", 8)
    monkeypatch.setattr(attention, "WIDE_ROWS", 8)  # of four heads a KV head: two tokens
    torch.testing.assert_close(attention.decode_attention(query, layer), at_once)


@pytest.mark.parametrize("launch", ["eager", "graph"])
@pytest.mark.parametrize("cache", ["static", "quantized-4"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_with_the_kernel_gives_the_text_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: str, launch: str
) -> None:
    monkeypatch.setattr(graph, "DEVICES", (DEVICE,))
    new_tokens = 6 if DEVICE == "cpu" else 130
    configuration = Configuration(cache=cache)
    reference = make_model(name).to(DEVICE)
    expected = Engine(reference, None, LoadGroup(), DEVICE).generate(PROMPT, configuration, new_tokens).tokens
    attention.register()
    model = make_model(name, "split_kv").to(DEVICE)
    draft = make_model(name, "split_kv", seed=1).to(DEVICE)
    engine = Engine(model, draft, LoadGroup(attention="split_kv"), DEVICE)
    split = configuration.replace(attention="split_kv", launch=launch)
    assert engine.generate(PROMPT, split, new_tokens).tokens == expected
    speculative = split.replace(draft="draft", depth=2)
    assert engine.generate(PROMPT, speculative, 4).tokens == expected[:4]
    with pytest.raises(Unsupported, match="fixed shape"):
        engine.generate(PROMPT, split.replace(cache="dynamic"), 2)


def test_without_a_gpu_the_kernel_is_unsupported(tmp_path: Any) -> None:
    with pytest.raises(Unsupported, match="split_kv needs a GPU"):
        load_model(tmp_path, attention="split_kv", device="cpu")


CHUNK = {"q_length": 5, "kv_length": 40, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize(
    "other",
    [
        {"kv_length": 41},  # the queries are not the newest tokens
        {"dtype": torch.float32},
        {"device": "cpu"},
        {"mask_function": sliding_window_causal_mask_function(8)},
        {"attention_mask": torch.ones(1, 40)},
        {"config": SimpleNamespace(head_dim=260)},
    ],
)
def test_a_chunk_needs_no_mask_only_where_flash_attention_can_be_used(other: dict[str, Any]) -> None:
    chunk = {**CHUNK, "config": SimpleNamespace(hidden_size=512, num_attention_heads=8)}
    assert attention._flash_needs_no_mask(35, **chunk)
    assert not attention._flash_needs_no_mask(35, **{**chunk, **other})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="flash attention needs a GPU")
@pytest.mark.parametrize(("heads", "kv_heads", "count", "held"), [(8, 2, 33, 100), (4, 4, 1, 7), (32, 8, 512, 3000)])
def test_a_chunk_without_a_mask_sees_what_a_causal_mask_lets_it(
    heads: int, kv_heads: int, count: int, held: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, heads, count, 64, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, kv_heads, held + count, 64, device=DEVICE, dtype=torch.bfloat16)
    module = module_of(heads // kv_heads)
    causal = torch.ones(count, held + count, dtype=torch.bool, device=DEVICE).tril(held)[None, None]
    masked = attention._prompt_attention(module, query, key, value, causal, None)
    assert attention._prompt_attention(module, query, key, value, None, None).shape == masked.shape
    torch.testing.assert_close(
        attention._prompt_attention(module, query, key, value, None, None), masked, atol=0.01, rtol=0.02
    )


@pytest.mark.parametrize("chunk", [0, 70])
@pytest.mark.parametrize("cache", ["static", "quantized-4", "quantized-fp8"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_in_chunks_gives_the_logits_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: str, chunk: int
) -> None:
    monkeypatch.setattr(graph, "DEVICES", (DEVICE,))
    monkeypatch.setattr(attention, "COPIED", 1)  # one KV head at a time
    prompt, configuration = PROMPT * 3, Configuration(cache=cache, prefill_chunk=chunk)
    expected = Engine(make_model(name).to(DEVICE), None, LoadGroup(), DEVICE).score(prompt, [1], configuration, 1)
    attention.register()
    model = make_model(name, "split_kv").to(DEVICE)
    engine = Engine(model, None, LoadGroup(attention="split_kv"), DEVICE)
    split = configuration.replace(attention="split_kv")
    torch.testing.assert_close(engine.score(prompt, [1], split, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_masks", [False, True])
def test_a_prompt_is_attended_to_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch, own_masks: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 12, 5, 16, device=DEVICE)
    key, value = torch.randn(2, 1, 6, 9, 16, device=DEVICE)
    mask = torch.rand(1, 12 if own_masks else 1, 5, 9, device=DEVICE) < 0.7
    mask[..., 0] = True
    module = module_of(2)
    whole = attention._prompt_attention(module, query, key, value, mask, None)
    asked = heads_asked_for(monkeypatch)
    monkeypatch.setattr(attention, "COPIED", 2 * 2 * 2 * 9 * 16 * 4)  # two of the six KV heads
    torch.testing.assert_close(attention._prompt_attention(module, query, key, value, mask, None), whole)
    assert asked == [2, 2, 2]
    assert whole.shape == (1, 5, 12, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # on a GPU, the latter needs no mask
@pytest.mark.parametrize("cache", ["quantized-8", "quantized-4", "quantized-2", "quantized-fp8"])
def test_stored_tokens_are_read_a_few_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch, cache: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    flash = DEVICE == "cuda" and dtype == torch.bfloat16
    # two of the four KV heads, dequantized and, for a mask, repeated
    monkeypatch.setattr(attention, "COPIED", (1 if flash else 3) * 2 * 2 * 240 * 16 * dtype.itemsize)
    chunks = [torch.randn(2, 1, 4, count, 16, device=DEVICE).to(dtype) for count in (200, 40)]
    whole, by_heads = one_layer(cache, 512), one_layer(cache, 512)
    by_heads.layers[0].by_heads = True
    for chunk in chunks:
        seen = whole.layers[0].update(*chunk)
        given = by_heads.layers[0].update(*chunk)
    assert [states.shape[2] for states in seen] == [240, 240]
    assert [states.shape[2] for states in given] == [240 - 128] * 2  # the window and the chunk
    query = torch.randn(1, 8, 40, 16, device=DEVICE).to(dtype)
    causal = torch.ones(1, 1, 40, 240, dtype=torch.bool, device=DEVICE).tril(200)
    repeated = [states.repeat_interleave(2, 1) for states in seen]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=causal).transpose(1, 2)
    read = type(by_heads.layers[0]).read
    asked = []
    monkeypatch.setattr(type(by_heads.layers[0]), "read", lambda *a: (asked.append((a[3], a[4].start)), read(*a))[1])
    mask = None if flash else causal
    got = attention._prompt_attention(module_of(2), query, *given, mask, None, by_heads.layers[0])
    assert asked == [(128, 0), (128, 2)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_many_queries_copy_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = heads_asked_for(monkeypatch)
    monkeypatch.setattr(attention, "COPIED", 1)
    monkeypatch.setattr(attention, "COPIED_BY_QUERIES", 8)
    key, value = torch.randn(2, 1, 2, 64, 16, device=DEVICE)  # 16,384 bytes for each KV head, repeated
    for count in (8, 16):  # 2,048 bytes of queries, 4,096 bytes
        mask = torch.ones(1, 1, count, 64, dtype=torch.bool, device=DEVICE)
        attention._prompt_attention(module_of(2), torch.randn(1, 4, count, 16, device=DEVICE), key, value, mask, None)
    assert asked == [1, 1, 2]


def test_keys_of_another_layer_are_unsupported() -> None:
    module = module_of(1)
    module.kv_layer = one_layer("static", 64).layers[0]
    states = torch.randn(3, 1, 2, 4, 16, device=DEVICE)
    with pytest.raises(Unsupported, match="cannot read the keys and values of another layer"):
        attention._attention(module, *states, None)


def module_of(group: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = group  # type: ignore[assignment]
    return module


def heads_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many KV heads PyTorch's attention is given, call by call."""
    asked: list[int] = []
    forward = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: (asked.append(a[2].shape[1]), forward(*a, **k))[1]
    )
    return asked
