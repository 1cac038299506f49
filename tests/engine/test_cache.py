"""Caches: rolled back without a trace, each group quantized once, errors within their bounds, bytes as computed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from autotune.config import CACHES
from autotune.engine.cache import (
    GROUP,
    WINDOW,
    Float8Layer,
    QuantizedLayer,
    StaticLayer,
    make_cache,
    rollback,
    room,
    settle,
    stored_bytes,
)
from autotune.engine.support import Unsupported
from tests.tiny_models import FAMILIES, tiny
from tests.tiny_models import WINDOW as SLIDING_WINDOW

from ..tiny_models import DIM, HEADS, LAYERS, QUANTIZED

CAPACITY = 320
HERE = tuple(word for word in CACHES if word != "offloaded")  # what a CPU can run

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": LAYERS,
}
FULL = LlamaConfig(**SHAPE)
SLIDING = MistralConfig(**SHAPE, sliding_window=SLIDING_WINDOW)


def states(tokens: int, seed: int = 0, dim: int = DIM, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys and values of each layer, [layers, 2, 1, heads, tokens, dim]; channels differ in size and offset."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn((LAYERS, 2, 1, HEADS, tokens, dim), generator=generator)
    return (random * torch.logspace(-1, 1, dim) + torch.linspace(-2, 2, dim)).to(dtype)


def new_cache(word: str, capacity: int = CAPACITY) -> Cache:
    return make_cache(word, SLIDING if word == "sliding" else FULL, capacity, "cpu")


def append(cache: Cache, new: torch.Tensor) -> list[torch.Tensor]:
    """What attention would read, per layer."""
    return [torch.stack(cache.update(keys, values, index)) for index, (keys, values) in enumerate(new)]


def append_one_by_one(cache: Cache, new: torch.Tensor) -> None:
    for index in range(new.shape[-2]):
        append(cache, new[..., index : index + 1, :])
        settle(cache)


def contents(cache: Cache) -> list[torch.Tensor]:
    """Everything that the cache holds and counts; what lies beyond the counts is left out."""
    held = []
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            stored, groups = layer.stored, layer.stored // GROUP
            held += [torch.tensor([layer.stored, layer.recent])]
            held += [layer.keys[:, :, : layer.recent], layer.values[:, :, : layer.recent]]
            held += [layer.key_codes[:, :, :stored], layer.value_codes[:, :, :stored]]
            if isinstance(layer, Float8Layer):
                held += [layer.key_scale[:, :, :stored], layer.value_scale[:, :, :stored]]
            else:
                held += [layer.key_ranges[:, :, :groups], layer.value_ranges[:, :, :, :stored]]
        else:
            length = layer.get_seq_length()
            held += [torch.tensor(length), layer.keys[:, :, :length], layer.values[:, :, :length]]
    return [tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in held]


def assert_identical(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape
        assert torch.equal(left, right)


def layer_of(cache: Cache) -> QuantizedLayer:
    layer = cache.layers[0]
    assert isinstance(layer, QuantizedLayer)
    return layer


# ---- rollback

steps = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=25)


@pytest.mark.parametrize("word", HERE)
@settings(max_examples=25, derandomize=True)
@given(prompt=st.integers(1, 150), steps=steps)
def test_rolling_back_leaves_the_cache_as_if_nothing_had_been_speculated(word, prompt, steps):
    true = states(prompt + sum(1 + kept for _, kept in steps) + 1, seed=1)
    garbage = states(16, seed=2)
    speculating, plain = new_cache(word, 2 * CAPACITY), new_cache(word, 2 * CAPACITY)
    for cache in (speculating, plain):
        append(cache, true[..., :prompt, :])
        settle(cache)
    done = prompt
    for proposed, agreeing in steps:
        proposed = min(proposed, room(speculating) - 1)
        kept = 1 + min(agreeing, proposed)  # the pending token, and what was accepted
        rejected = 1 + proposed - kept
        fed = torch.cat([true[..., done : done + kept, :], garbage[..., :rejected, :]], dim=-2)
        append(speculating, fed)
        rollback(speculating, rejected)
        settle(speculating)
        append_one_by_one(plain, true[..., done : done + kept, :])
        done += kept
        assert speculating.get_seq_length() == plain.get_seq_length() == done
    assert_identical(contents(speculating), contents(plain))
    following = true[..., done : done + 1, :]
    assert_identical(append(speculating, following), append(plain, following))


@pytest.mark.parametrize("word", QUANTIZED)
@settings(max_examples=25, derandomize=True)
@given(cuts=st.lists(st.integers(1, 130), min_size=1, max_size=4))
def test_how_the_prompt_is_cut_does_not_change_what_is_stored(word, cuts):
    prompt = states(sum(cuts), seed=3)
    chunked, single = new_cache(word, 600), new_cache(word, 600)
    for part in prompt.split(cuts, dim=-2):
        append(chunked, part)
        settle(chunked)
    append_one_by_one(single, prompt)
    assert_identical(contents(chunked), contents(single))


@pytest.mark.parametrize("word", QUANTIZED)
def test_rolling_back_further_than_the_window_raises(word):
    cache = new_cache(word)
    append_one_by_one(cache, states(WINDOW + GROUP))
    assert layer_of(cache).recent == WINDOW
    with pytest.raises(ValueError, match=f"{WINDOW + 1} tokens cannot be rolled back: {WINDOW} are in the window"):
        rollback(cache, WINDOW + 1)
    rollback(cache, WINDOW)
    assert cache.get_seq_length() == GROUP


def test_a_static_cache_refuses_to_roll_back_more_than_it_holds():
    cache = new_cache("static")
    append(cache, states(5))
    with pytest.raises(ValueError, match="6 tokens cannot be rolled back: the cache holds 5"):
        rollback(cache, 6)


def test_a_sliding_cache_keeps_its_window_and_no_more_once_settled():
    cache = new_cache("sliding")
    prompt = states(100)
    append(cache, prompt)
    settle(cache)
    append_one_by_one(cache, states(7, seed=1))
    rollback(cache, 0)
    assert cache.get_seq_length() == 107
    assert [layer.keys.shape[-2] for layer in cache.layers] == [SLIDING_WINDOW - 1] * LAYERS


def test_a_sliding_cache_is_rolled_back_across_the_edge_of_its_window():
    prompt, garbage = states(SLIDING_WINDOW - 2), states(8, seed=1)
    speculating, plain = new_cache("sliding"), new_cache("sliding")
    for cache in (speculating, plain):
        append(cache, prompt)
        settle(cache)
    append(speculating, garbage)
    rollback(speculating, 8)
    settle(speculating)
    following = states(1, seed=2)
    assert_identical(append(speculating, following), append(plain, following))


# ---- quantized once


@pytest.mark.parametrize("word", QUANTIZED)
def test_a_group_is_quantized_once_and_never_touched_again(word):
    cache, new = new_cache(word), states(CAPACITY)
    snapshot: list[torch.Tensor] = []
    counts = []
    for index in range(CAPACITY):
        append(cache, new[..., index : index + 1, :])
        settle(cache)
        layer = layer_of(cache)
        codes = [layer.key_codes, layer.value_codes]
        for before, after in zip(snapshot, codes, strict=False):
            assert torch.equal(before, after[:, :, : before.shape[2]].view(torch.uint8))
        snapshot = [tensor[:, :, : layer.stored].view(torch.uint8).clone() for tensor in codes]
        counts.append(layer.stored)
    assert sorted(set(counts)) == [0, 64, 128, 192, 256]


@pytest.mark.parametrize("word", QUANTIZED)
def test_the_error_of_a_stored_token_does_not_grow_with_the_steps_after_it(word):
    cache, new = new_cache(word), states(CAPACITY)
    append_one_by_one(cache, new[..., : WINDOW + GROUP, :])
    first = append(cache, new[..., WINDOW + GROUP : WINDOW + GROUP + 1, :])[0][..., :GROUP, :]
    assert not torch.equal(first, new[0][..., :GROUP, :])
    append_one_by_one(cache, new[..., WINDOW + GROUP + 1 : -1, :])
    last = append(cache, new[..., -1:, :])[0][..., :GROUP, :]
    assert torch.equal(first, last)


@pytest.mark.parametrize("word", QUANTIZED)
def test_the_newest_tokens_are_read_in_full_precision(word):
    cache, new = new_cache(word), states(200)
    append(cache, new[..., :150, :])
    settle(cache)
    append_one_by_one(cache, new[..., 150:199, :])
    read = append(cache, new[..., 199:, :])[0]
    assert read.shape[-2] == 200
    assert torch.equal(read[..., -WINDOW:, :], new[0][..., -WINDOW:, :])


@pytest.mark.parametrize("word", QUANTIZED)
def test_a_long_chunk_is_attended_to_in_full_precision(word):
    cache, new = new_cache(word), states(200)
    append(cache, new[..., :20, :])
    settle(cache)
    assert torch.equal(append(cache, new[..., 20:, :])[1], new[1])


# ---- room and capacity


@pytest.mark.parametrize("word", QUANTIZED)
def test_room_counts_down_to_the_moment_a_group_is_stored(word):
    cache, new = new_cache(word), states(CAPACITY)
    assert room(cache) == WINDOW + GROUP
    for index in range(CAPACITY):
        append(cache, new[..., index : index + 1, :])
        settle(cache)
        length = index + 1
        stored = max(0, (length - WINDOW) // GROUP * GROUP)
        assert layer_of(cache).stored == stored
        assert layer_of(cache).recent == length - stored
        assert room(cache) == WINDOW + GROUP - (length - stored) > 0


@pytest.mark.parametrize("word", QUANTIZED)
def test_a_full_room_of_tokens_can_be_taken_back(word):
    cache, new = new_cache(word), states(200)
    append(cache, new[..., :50, :])
    settle(cache)
    before = [tensor.clone() for tensor in contents(cache)]
    append(cache, new[..., 50 : 50 + room(cache), :])
    assert room(cache) == 0
    rollback(cache, WINDOW + GROUP - 50)
    settle(cache)
    assert_identical(contents(cache), before)


@pytest.mark.parametrize("word", ["dynamic", "static", "sliding"])
def test_caches_in_full_precision_have_room_for_any_depth(word):
    cache = new_cache(word)
    append(cache, states(100))
    assert room(cache) >= CAPACITY


@pytest.mark.parametrize("word", ["static", *QUANTIZED])
@pytest.mark.parametrize("step", [1, 50, 330])
def test_writing_past_the_capacity_raises(word, step):
    cache, new = new_cache(word, capacity=CAPACITY), states(400)

    def fill() -> None:
        for part in new.split(step, dim=-2):
            append(cache, part)
            settle(cache)

    with pytest.raises(ValueError, match=f"do not fit a cache of {CAPACITY}"):
        fill()


@pytest.mark.parametrize("word", ["static", *QUANTIZED])
def test_a_preallocated_cache_holds_as_much_full_as_after_its_first_token(word):
    cache = new_cache(word)
    append(cache, states(1))
    settle(cache)
    before = stored_bytes(cache)
    append(cache, states(CAPACITY - 1))
    settle(cache)
    assert cache.get_seq_length() == CAPACITY
    assert stored_bytes(cache) == before > 0


@pytest.mark.parametrize("word", HERE)
def test_the_mask_covers_what_is_read(word):
    cache = new_cache(word)
    for tokens in (1, 20, 40, 60, 5, 1):
        length, _ = cache.get_mask_sizes(tokens, 0)
        assert append(cache, states(tokens))[0].shape[-2] == length
        settle(cache)


# ---- bytes


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # 8 KV heads of 128 channels, 1024 slots, float32 windows of 96, two layers
        ("static", 2 * 2 * 8 * 1024 * 128 * 4),
        ("quantized-8", 2 * 8 * (2 * 1024 * 128 + 2 * 16 * 128 * 2 + 2 * 1024 * 2 * 2 + 2 * 96 * 128 * 4)),
        ("quantized-4", 2 * 8 * (2 * 1024 * 64 + 2 * 16 * 128 * 2 + 2 * 1024 * 2 * 2 + 2 * 96 * 128 * 4)),
        ("quantized-2", 2 * 8 * (2 * 1024 * 32 + 2 * 16 * 128 * 2 + 2 * 1024 * 2 * 2 + 2 * 96 * 128 * 4)),
        ("quantized-fp8", 2 * 8 * (2 * 1024 * 128 + 2 * 1024 * 2 + 2 * 96 * 128 * 4)),
        ("dynamic", 2 * 2 * 8 * 10 * 128 * 4),
    ],
)
def test_the_bytes_held_are_those_that_arithmetic_says(word, expected):
    cache = new_cache(word, capacity=1000 if word in QUANTIZED else 1024)
    new = torch.randn(1, 8, 10, 128)
    for index in range(LAYERS):
        cache.update(new, new, index)
    assert stored_bytes(cache) == expected


# ---- error


def through(word: str, new: torch.Tensor) -> torch.Tensor:
    """The first group as it is read back."""
    cache = new_cache(word)
    append(cache, new)
    settle(cache)
    assert layer_of(cache).stored >= GROUP
    return append(cache, new[..., :1, :])[0][..., :GROUP, :]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_at_most_half_a_step_keys_per_channel_values_per_token(bits, seed):
    new = states(150, seed)
    keys, values = new[0][..., :GROUP, :]
    for read, true, dim in zip(through(f"quantized-{bits}", new), (keys, values), (-2, -1), strict=True):
        low, high = torch.aminmax(true, dim=dim, keepdim=True)
        bound = (high - low) / (2**bits - 1) / 2 * 1.002 + low.abs() * 2**-10
        assert ((read - true).abs() <= bound).all()
        assert (read - true).abs().max() > bound.max() / 50  # it is the quantized states that are read


@pytest.mark.parametrize("word", QUANTIZED)
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 8), (8, 24)])
def test_keys_and_values_of_two_sizes_are_read_as_beside_others_of_their_own(word, dim, value_dim):
    keys, values = states(150, 0, dim)[0, 0], states(150, 1, value_dim)[0, 1]
    read = []
    for pair in ((keys, values), (keys, keys), (values, values)):
        layer = new_cache(word).layers[0]
        layer.update(*pair)
        layer.settle()
        assert layer.stored >= GROUP
        read.append(layer.update(*(each[:, :, :1] for each in pair)))
    assert_identical([*read[0]], [read[1][0], read[2][1]])


def test_the_error_of_fp8_is_relative_to_each_value():
    new = states(150)
    read, true = through("quantized-fp8", new), new[0][..., :GROUP, :]
    largest = true.abs().amax(-1, keepdim=True)
    assert ((read - true).abs() <= true.abs() / 16 * 1.001 + largest / 448 / 512).all()
    assert not torch.equal(read, true)


@pytest.mark.parametrize("word", QUANTIZED)
def test_constant_states_and_zeros_come_back_as_they_were(word):
    new = torch.zeros(LAYERS, 2, 1, HEADS, 150, DIM)
    assert torch.equal(through(word, new), new[0][..., :GROUP, :])
    assert torch.allclose(through(word, new + 3), new[0][..., :GROUP, :] + 3, rtol=2**-10)


@pytest.mark.parametrize("word", QUANTIZED)
def test_a_bfloat16_model_reads_bfloat16(word):
    new = states(150, dtype=torch.bfloat16)
    read = through(word, new)
    assert read.dtype == torch.bfloat16
    assert torch.isfinite(read).all()


# ---- which cache fits which model


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_is_for_models_with_a_sliding_window_only(family):
    config = tiny(family).config
    if family in ("mistral", "gemma3"):
        assert any(layer.is_sliding for layer in make_cache("sliding", config, 100, "cpu").layers)
    else:
        with pytest.raises(Unsupported, match="has no sliding-window layers: cache = sliding does not apply"):
            make_cache("sliding", config, 100, "cpu")


def test_a_window_that_the_model_switches_off_is_no_window():
    config = Qwen3Config(**SHAPE, use_sliding_window=False, sliding_window=16)
    with pytest.raises(Unsupported, match="qwen3 has no sliding-window layers"):
        make_cache("sliding", config, 100, "cpu")


def test_offloading_needs_a_gpu():
    with pytest.raises(Unsupported, match="there is no GPU here"):
        make_cache("offloaded", FULL, 100, "cpu")


@pytest.mark.parametrize("word", [word for word in HERE if word != "sliding"])  # that one knows of them from the config
def test_layers_that_share_the_keys_of_others_are_rolled_back_with_them(word):
    cache, new = new_cache(word), states(5)
    for tokens in (5, 2):
        cache.update(*new[0][..., :tokens, :], 0)
    rollback(cache, 2)
    settle(cache)
    assert cache.get_seq_length() == 5


def test_an_unknown_cache_is_named():
    with pytest.raises(Unsupported, match="unknown cache quantized-3"):
        make_cache("quantized-3", FULL, 100, "cpu")


@pytest.mark.parametrize(("word", "dim", "value_dim"), [("quantized-2", 8, 6), ("quantized-4", 7, 8)])
def test_head_sizes_that_cannot_be_packed_are_unsupported(word, dim, value_dim):
    cache = new_cache(word)
    with pytest.raises(Unsupported, match="needs keys and values that fill whole bytes, not of"):
        cache.update(torch.zeros(1, 2, 3, dim), torch.zeros(1, 2, 3, value_dim), 0)


def test_a_static_layer_writes_in_place():
    layer = StaticLayer(10)
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    pointer = layer.keys.data_ptr()
    read, _ = layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    assert layer.keys.data_ptr() == read.data_ptr() == pointer
    assert (layer.get_seq_length(), layer.get_max_length()) == (5, 10)
