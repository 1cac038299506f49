# ruff: noqa: E402 - the interpreter must be asked for before the kernels are defined
"""The small kernels against PyTorch's operations, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from autotune.engine.cache import GROUP, QuantizedLayer
from autotune.engine.embedding import HostEmbedding, lock_pages
from autotune.engine.fusion import convolves, half_turned, is_delta_rule
from autotune.engine.kernels import append, convolve, delta_rule, gather, normalize, normalize_gated, rotate
from autotune.engine.support import Unsupported
from tests.tiny_models import tiny, tokens


@pytest.mark.parametrize("width", [96, 2500])
def test_gathered_rows(width: int) -> None:
    table = torch.randn(7, 2 * width).bfloat16()[:, :width]
    ids = torch.tensor([6, 0, 6, 3])
    assert torch.equal(gather(table.to(DEVICE), ids.to(DEVICE)).cpu(), table[ids])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_table_in_host_memory_is_read_as_the_model_reads_it(family: str) -> None:
    table = tiny(family).bfloat16().get_input_embeddings()
    ids = torch.tensor(tokens(5))
    expected = table(ids)
    if DEVICE == "cuda":
        lock_pages(table, "cuda:0")
    assert torch.equal(HostEmbedding(table)(ids.to(DEVICE)).cpu(), expected)


def test_a_table_that_does_more_than_look_up_is_refused() -> None:
    class Normed(torch.nn.Embedding):
        pass

    with pytest.raises(Unsupported, match="cannot look up in a Normed"):
        HostEmbedding(Normed(3, 4))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [96, 512])
def test_normalized_rows(width: int, offset: float) -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 3, 2 * width, device=DEVICE)[..., :width]
    weight = torch.randn(width, device=DEVICE)
    expected = torch.nn.functional.rms_norm(states, (width,), weight + offset, 1e-5)
    torch.testing.assert_close(normalize(states, weight, offset, 1e-5), expected)


@pytest.mark.parametrize("width", [96, 128])
def test_normalized_rows_through_a_gate(width: int) -> None:
    torch.manual_seed(0)
    states, gate = torch.randn(2, 5, 2 * width, device=DEVICE)[..., :width]
    weight = torch.randn(width, device=DEVICE)
    expected = torch.nn.functional.rms_norm(states, (width,), weight, 1e-6) * torch.nn.functional.silu(gate)
    torch.testing.assert_close(normalize_gated(states, gate, weight, 1e-6), expected)


@pytest.mark.parametrize("file", [modeling_qwen3_next, modeling_qwen3_5])
def test_the_delta_rule_and_the_convolution_of_a_models_file_are_known(file) -> None:
    assert is_delta_rule(file.torch_recurrent_gated_delta_rule)
    assert is_delta_rule(file.torch_chunk_gated_delta_rule)
    assert convolves(file.causal_conv1d_update)
    assert not is_delta_rule(lambda *args, **kwargs: (args[2], kwargs["initial_state"]))
    assert not convolves(lambda inputs, *args: inputs)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("key_heads", "heads", "dim", "width"), [(2, 4, 16, 32), (3, 3, 24, 40), (16, 32, 128, 128)])
def test_a_delta_nets_steps_are_those_of_the_model(count, key_heads, heads, dim, width) -> None:
    torch.manual_seed(0)
    mixed = torch.randn(1, (2 * key_heads * dim + heads * width), count, device=DEVICE).transpose(1, 2)
    parts = mixed.split([key_heads * dim, key_heads * dim, heads * width], dim=-1)
    query, key, value = (part.reshape(1, count, -1, size) for part, size in zip(parts, (dim, dim, width), strict=True))
    g, beta = -torch.rand(1, count, heads, device=DEVICE), torch.rand(1, count, heads, device=DEVICE)
    state = torch.randn(1, heads, dim, width, device=DEVICE)
    words = {"g": g, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, after = modeling_qwen3_5.torch_recurrent_gated_delta_rule(
        query, key, value, initial_state=state.clone(), **words
    )
    place = state.data_ptr()
    torch.testing.assert_close(delta_rule(query, key, value, g, beta, state), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-4, atol=1e-5)
    assert state.data_ptr() == place


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolutions_next_output_and_state(bias: bool) -> None:
    torch.manual_seed(0)
    inputs, state = torch.randn(1, 200, 1, device=DEVICE), torch.randn(1, 200, 4, device=DEVICE)
    weight, shift = torch.randn(200, 4, device=DEVICE), torch.randn(200, device=DEVICE) if bias else None
    held = state.clone()
    expected = modeling_qwen3_5.causal_conv1d_update(inputs, held, weight, shift, "silu")
    torch.testing.assert_close(convolve(inputs, state, weight, shift), expected)
    assert torch.equal(state, held)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "count"), [(8, 2, 64, 1), (4, 4, 24, 5)])
def test_rotated_queries_and_keys(heads: int, kv_heads: int, dim: int, count: int) -> None:
    torch.manual_seed(0)
    merged = torch.randn(1, count, (heads + kv_heads) * dim + 3, device=DEVICE)[
        ..., :-3
    ]  # as a merged product gives them
    query, key = merged.unflatten(-1, (-1, dim)).transpose(1, 2).split([heads, kv_heads], dim=1)
    cos, sin = torch.randn(2, 1, count, dim, device=DEVICE)
    for own, states in zip(rotate(query, key, cos, sin), (query, key), strict=True):
        torch.testing.assert_close(own, states * cos[:, None] + half_turned(states) * sin[:, None])


@pytest.mark.parametrize("stored", [None, 64])
def test_appended_keys_and_values_land_behind_the_held_ones(stored: int | None) -> None:
    torch.manual_seed(0)
    keys, values = torch.zeros(1, 2, 40, 24, device=DEVICE), torch.zeros(1, 2, 40, 16, device=DEVICE)
    new = torch.randn(1, 3, 2, 40, device=DEVICE).transpose(1, 2)
    held = 7 + (stored or 0)
    lengths = [None if count is None else torch.tensor([count], device=DEVICE) for count in (held, stored)]
    assert lengths[0] is not None
    append(keys, values, new[..., :24], new[..., 24:], lengths[0], lengths[1])
    assert torch.equal(keys[:, :, 7:10], new[..., :24])
    assert torch.equal(values[:, :, 7:10], new[..., 24:])
    keys[:, :, 7:10] = values[:, :, 7:10] = 0
    assert not keys.any()
    assert not values.any()


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *[torch.bfloat16] * (DEVICE == "cuda")])  # interpreted, it is cut off
@pytest.mark.parametrize(("groups", "behind"), [(1, 0), (1, 32), (1, 5), (3, 0)])
def test_stored_groups_and_the_window_behind_them(dim: int, dtype: torch.dtype, groups: int, behind: int) -> None:
    torch.manual_seed(0)
    tokens = groups * GROUP
    window = torch.randn(2, 1, 3, tokens + behind + 7, dim, device=DEVICE).to(dtype) * 3
    moved, exact = window.clone(), window.cpu()  # on a GPU PyTorch multiplies by 1 / 15, which loses a bit
    plain, ours = (QuantizedLayer(8 * GROUP, 4) for _ in range(2))
    plain.lazy_initialization(exact[0], exact[1])
    ours.lazy_initialization(window[0], window[1])
    plain._store(*exact[:, :, :, :GROUP])
    ours._store_by_kernel(*window[:, :, :, :GROUP])
    plain._store(*exact[:, :, :, :tokens])  # behind the group that is stored already
    ours._store_by_kernel(*moved[:, :, :, :tokens], behind=behind)
    assert ours.stored == plain.stored == GROUP + tokens
    for name in ("key_ranges", "value_ranges", "key_codes", "value_codes"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(plain, name)), name
    assert torch.equal(moved[..., :behind, :], window[..., tokens : tokens + behind, :])
    assert torch.equal(moved[..., behind:, :], window[..., behind:, :])
