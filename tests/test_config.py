from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import (
    ATTENTIONS,
    CACHES,
    EMBEDDINGS,
    HEAD_WEIGHTS,
    LAUNCHES,
    LM_HEADS,
    MIB,
    OUTCOMES,
    SPECULATIONS,
    WEIGHTS,
    Configuration,
    LoadGroup,
    Record,
    mib,
    parse_bytes,
    parse_tokens,
    within_noise,
)

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "k": 10**3, "M": 10**6, "G": 10**9}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

configurations = st.builds(
    Configuration,
    weights=st.sampled_from(WEIGHTS),
    lm_head=st.sampled_from(LM_HEADS),
    embeddings=st.sampled_from(EMBEDDINGS),
    draft=st.sampled_from(["none", "prompt-lookup", "/models/draft", "owner/draft"]),
    draft_weights=st.sampled_from(["none", *WEIGHTS]),
    depth=st.integers(0, 16),
    speculation=st.sampled_from(SPECULATIONS),
    cache=st.sampled_from(CACHES),
    attention=st.sampled_from(ATTENTIONS),
    prefill_chunk=st.sampled_from([0, 256, 2048]),
    launch=st.sampled_from(LAUNCHES),
)
figures = st.floats(0.001, 1e6) | st.none()
intervals = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)) | st.none()
sizes = st.integers(0, 2**40) | st.none()
json_values = st.dictionaries(
    st.text(max_size=8), st.floats(0, 1e6) | st.integers(0, 9) | st.text(max_size=8), max_size=3
)
records = st.builds(
    Record,
    configuration=configurations,
    context_tokens=st.integers(1, 2**20),
    outcome=st.sampled_from(OUTCOMES),
    reason=st.text(),
    tokens_per_s=figures,
    tokens_per_s_interval=intervals,
    decode_tokens_per_s=figures,
    decode_tokens_per_s_interval=intervals,
    ttft_s=figures,
    ttft_s_interval=intervals,
    peak_bytes=sizes,
    memory=st.dictionaries(st.sampled_from(["base", "weights", "kv_cache"]), st.integers(0, 2**40)),
    perplexity_ratio=figures,
    perplexity_ratio_interval=intervals,
    quality=json_values,
    samples=st.lists(json_values, max_size=3),
    machine=json_values,
)


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_a_whole_size_is_the_number_times_its_unit(number: int, unit: str, gap: str, upper: bool) -> None:
    text = f"{number}{gap}{unit}"
    assert parse_bytes(text.upper() if upper else text) == number * UNITS[unit]


@given(st.integers(1, 10**6), st.integers(0, 3), st.sampled_from(["MB", "GB", "MiB", "GiB"]))
def test_a_fraction_of_a_unit_is_exact_to_the_byte(digits: int, places: int, unit: str) -> None:
    number = Decimal(digits).scaleb(-places)
    assert parse_bytes(f"{number:f}{unit}") == int(number * UNITS[unit])


def test_gb_is_a_power_of_ten_and_gib_a_power_of_two() -> None:
    assert parse_bytes("6.5GB") == 6_500_000_000
    assert parse_bytes("6GiB") == 6 * 2**30
    assert parse_bytes("6200 mib") == 6200 * MIB


@given(st.integers(1, 999))
def test_a_size_that_is_echoed_can_be_read_again(size: int) -> None:
    assert parse_bytes(mib(size * MIB)) == size * MIB


def test_sizes_are_echoed_in_mib() -> None:
    assert mib(6_500_000_000) == "6,199 MiB"


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0GB", "1 XB", "1e9", "nan", "inf", "1,5GB", "6.5.1GB", "1GB 2GB", "٣GB", "0.1B"]
)
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="memory size") as caught:
        parse_bytes(text)
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize("parse", [parse_bytes, parse_tokens])
@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{1,4} ?[kmgKMG]?i?[bB]?", fullmatch=True))
def test_any_text_is_a_positive_size_or_refused_with_what_it_was(parse: Callable[[str], int], text: str) -> None:
    size: int | None = None
    said = ""
    try:
        size = parse(text)
    except ValueError as error:
        said = str(error)
    assert size > 0 if size is not None else f"'{text}' is not a" in said


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("k", 1024), ("K", 1024), (" k", 1024)]))
def test_a_token_count_in_k_is_times_1024(number: int, unit: tuple[str, int]) -> None:
    assert parse_tokens(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize("text", ["", "0", "0k", "-4", "1.5k", "4M", "4 GB", "four", "4k,8k"])
def test_what_is_no_token_count_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="token count") as caught:
        parse_tokens(text)
    assert f"'{text}'" in str(caught.value)


@given(configurations)
def test_a_configuration_is_already_in_its_canonical_form(configuration: Configuration) -> None:
    assert Configuration(**dataclasses.asdict(configuration)) == configuration


@given(configurations, configurations)
def test_keys_are_equal_exactly_for_what_is_equal(one: Configuration, other: Configuration) -> None:
    assert (one.key() == other.key()) == (one == other)


@given(configurations)
def test_a_configuration_survives_its_key(configuration: Configuration) -> None:
    assert Configuration(**json.loads(configuration.key())) == configuration


@given(configurations, st.integers(0, 16), st.sampled_from(WEIGHTS))
def test_without_a_draft_its_depth_and_weights_make_no_difference(c: Configuration, depth: int, word: str) -> None:
    assert c.replace(draft="none", depth=depth, draft_weights=word) == c.replace(draft="none")


@given(configurations, st.integers(1, 16), st.sampled_from(WEIGHTS))
def test_prompt_lookup_has_no_weights_of_its_own(c: Configuration, depth: int, word: str) -> None:
    assert c.replace(draft="prompt-lookup", depth=depth, draft_weights=word).draft_weights == "none"


@given(configurations)
def test_prompt_lookup_of_no_tokens_is_no_draft(c: Configuration) -> None:
    assert c.replace(draft="prompt-lookup", depth=0) == c.replace(draft="none")


@given(configurations)
def test_only_a_depth_of_two_or_more_can_adapt(c: Configuration) -> None:
    assert c.speculation == "constant" or (c.draft != "none" and c.depth > 1)
    assert c.replace(depth=1, speculation="adaptive") == c.replace(depth=1, speculation="constant")
    assert c.replace(draft="/d", depth=2, speculation="adaptive").speculation == "adaptive"


def test_a_draft_model_takes_the_weights_of_the_target_unless_told() -> None:
    assert Configuration(weights="bnb-nf4", draft="/d", depth=4).draft_weights == "bnb-nf4"
    assert Configuration(weights="bnb-nf4", draft="/d", draft_weights="bf16", depth=4).draft_weights == "bf16"


def test_an_idle_draft_model_stays_loaded() -> None:
    used = Configuration(draft="/d", depth=4)
    idle = used.replace(depth=0)
    assert idle.has_draft_model
    assert idle.load_group == used.load_group != Configuration().load_group


@given(
    configurations, st.sampled_from(CACHES), st.sampled_from(LAUNCHES), st.sampled_from([0, 512]), st.integers(0, 16)
)
def test_what_changes_per_request_needs_no_reload(
    c: Configuration, cache: str, launch: str, chunk: int, depth: int
) -> None:
    changed = c.replace(cache=cache, launch=launch, prefill_chunk=chunk, depth=depth)
    assert changed.load_group == c.load_group


@given(configurations)
def test_the_load_group_of_a_configuration_without_a_draft_model_has_none(c: Configuration) -> None:
    group = c.load_group
    assert isinstance(group, LoadGroup)
    assert (group.draft, group.draft_weights) == ((c.draft, c.draft_weights) if c.has_draft_model else ("none", "none"))


@given(
    configurations,
    st.sampled_from(["none", "prompt-lookup", "/d"]),
    st.integers(0, 16),
    st.sampled_from(SPECULATIONS),
    st.sampled_from(LAUNCHES),
)
def test_speculation_and_launch_do_not_change_what_is_said(
    c: Configuration, draft: str, depth: int, speculation: str, launch: str
) -> None:
    changed = c.replace(draft=draft, depth=depth, speculation=speculation, launch=launch)
    assert changed.quality_key == c.quality_key


def test_a_quantized_head_is_stored_as_weights_of_some_word_are() -> None:
    assert {*HEAD_WEIGHTS, "bf16", "fp32"} == set(LM_HEADS)
    assert set(HEAD_WEIGHTS.values()) <= set(WEIGHTS)


@pytest.mark.parametrize(
    "change", [{"weights": "bnb-nf4"}, {"lm_head": "nf4"}, {"cache": "static"}, {"attention": "eager"}]
)
def test_what_stores_or_computes_differently_can_say_something_else(change: dict[str, str]) -> None:
    assert Configuration(**change).quality_key != Configuration().quality_key  # type: ignore[arg-type]


def test_the_prefill_chunk_changes_the_text_only_through_a_quantized_cache() -> None:
    quantized, plain = Configuration(cache="quantized-4"), Configuration()
    assert quantized.replace(prefill_chunk=512).quality_key != quantized.quality_key
    assert plain.replace(prefill_chunk=512).quality_key == plain.quality_key


def test_complexity_counts_what_is_not_stock_but_the_weights() -> None:
    assert Configuration(weights="bnb-nf4").complexity == 0
    assert Configuration(weights="bnb-nf4", cache="static", launch="graph").complexity == 2
    assert Configuration(draft="prompt-lookup", depth=4).complexity == 2
    assert Configuration(draft="prompt-lookup", depth=4, speculation="adaptive").complexity == 3


@given(configurations, configurations)
def test_simplicity_puts_any_two_in_one_order_and_first_by_how_many_knobs_differ(
    one: Configuration, other: Configuration
) -> None:
    assert (one.simplicity == other.simplicity) == (one == other)
    assert (one.simplicity < other.simplicity) != (other.simplicity <= one.simplicity)
    if one.complexity < other.complexity:
        assert one.simplicity < other.simplicity


def test_of_as_many_knobs_the_first_decides_by_the_order_of_its_words() -> None:
    static, chunks, graph = (
        Configuration(cache="static"),
        Configuration(prefill_chunk=512),
        Configuration(launch="graph"),
    )
    assert sorted([static, graph, chunks], key=lambda c: c.simplicity) == [graph, chunks, static]
    lookups = [Configuration(draft="prompt-lookup", depth=depth) for depth in (2, 4, 16)]
    drafts = [Configuration(draft="/a/draft", draft_weights="none", depth=2)]
    assert sorted([*drafts, *lookups[::-1]], key=lambda c: c.simplicity) == [*lookups, *drafts]
    caches = [Configuration(cache=cache) for cache in ("static", "quantized-8", "quantized-4", "offloaded")]
    assert sorted([*caches[2:], *caches[:2]], key=lambda c: c.simplicity) == caches


@given(records)
def test_a_record_survives_json(record: Record) -> None:
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@given(records)
def test_a_field_of_a_later_version_is_passed_over(record: Record) -> None:
    data: dict[str, Any] = {**record.to_json(), "watts": 250}
    assert Record.from_json(data) == record


@given(configurations)
def test_configurations_cannot_be_changed(configuration: Configuration) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.depth = 3  # type: ignore[misc]


def test_each_objective_reads_its_own_figure() -> None:
    record = Record(Configuration(), 64, "ok", tokens_per_s=40.0, decode_tokens_per_s=50.0, ttft_s=0.25)
    assert [record.rate(objective) for objective in ("end-to-end", "decode", "ttft")] == [40.0, 50.0, 4.0]


@pytest.mark.parametrize("objective", ["end-to-end", "decode", "ttft"])
def test_a_failure_never_becomes_a_number(objective: Any) -> None:
    with pytest.raises(ValueError, match=f"out_of_memory has no {objective} figure"):
        Record(Configuration(), 64, "out_of_memory").rate(objective)


@pytest.mark.parametrize(
    ("ratio", "noise"),
    [(1.0, True), (1.0019, True), (1.0021, False), (0.9981, True), (0.9979, False), (math.nan, False)],
)
def test_a_ratio_is_noise_where_the_reference_differs_as_much_from_itself_in_either_direction(
    ratio: float, noise: bool
) -> None:
    assert within_noise(ratio, {"512": {"ln_ratio": 0.002, "kl_divergence": 0.1}}) == noise
    assert not within_noise(ratio, {})
