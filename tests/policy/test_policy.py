from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import MIB, Configuration, Record, Workload
from autotune.model.fingerprint import fingerprint
from autotune.policy.choice import best_group, choose
from autotune.policy.export import as_markdown
from autotune.policy.policy import (
    SCHEMA_FILE,
    Evidence,
    Policy,
    PolicyError,
    load_of,
    schema,
    settings_of,
    to_configuration,
    write_policy,
)
from autotune.policy.rules import expected_of, make_policy
from tests.policies import (
    BUDGET,
    DEEP,
    DRAFT,
    FAST,
    MODEL,
    OTHER,
    STOCK,
    around,
    both_finals,
    chosen_at,
    configurations,
    finals,
    policy_of,
    printed,
    tied_with,
)
from tests.records import synthetic_record


def a_policy(contexts: tuple[int, ...] = (512, 2048)) -> Policy:
    records = [r for c in contexts for r in both_finals(FAST, c, 150) + both_finals(STOCK, c, 100)]
    policy = policy_of(records, dict.fromkeys(contexts, FAST), dict.fromkeys(contexts, STOCK))
    assert policy is not None
    return policy


@given(st.sets(st.integers(1, 10**5), min_size=1, max_size=5), st.integers(1, 10**5))
def test_the_rule_of_a_prompt_is_the_shortest_that_holds_it(limits: set[int], length: int) -> None:
    policy = a_policy(tuple(sorted(limits)))
    if length > max(limits):
        with pytest.raises(PolicyError, match=rf"{length} tokens.* up to {max(limits)}"):
            policy.rule_for(length)
    else:
        assert policy.rule_for(length).max_context_tokens == min(limit for limit in limits if limit >= length)


def test_a_policy_survives_its_file_with_the_fields_of_a_later_version(tmp_path: Path) -> None:
    data = a_policy().model_dump(mode="json")
    data["watts"] = 250
    data["rules"][0]["settings"]["new_knob"] = {"a": [1]}
    data["load"]["rope"] = "yarn"
    (tmp_path / "policy.json").write_text(json.dumps(data))
    write_policy(Policy.load(tmp_path / "policy.json"), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == data


names = st.text(min_size=1, max_size=12)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(names, values, max_size=3),
    max_leaves=6,
)


def objects(data: Any) -> list[dict[str, Any]]:
    """Every object of a policy that has fields, the free ones (environment, workload, files) left out."""
    if isinstance(data, list):
        return [found for value in data for found in objects(value)]
    if not isinstance(data, dict):
        return []
    free = ("environment", "workload", "files")
    return [data, *(found for key, value in data.items() if key not in free for found in objects(value))]


@given(st.data())
def test_whatever_a_later_version_adds_at_any_place_survives_reading_and_writing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    written = a_policy().model_dump(mode="json")
    places = objects(written)
    assert len(places) == 19
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(places))
        fields = names | st.sampled_from(["copy", "json", "model_dump", "model_config", "__class__", "self"])
        place[data.draw(fields.filter(lambda name, place=place: name not in place))] = data.draw(json_values)
    for free in ("environment", "workload"):
        written[free] |= data.draw(st.dictionaries(names, json_values, max_size=2))
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    path.write_text(json.dumps(written))
    write_policy(Policy.load(path), path)
    assert json.loads(path.read_text()) == written


@pytest.mark.parametrize(
    ("place", "known", "misspelt"),
    [
        ([], "drafts", "draft"),
        (["model"], "revision", "revison"),
        (["rules", 0], "speedup_interval", "speedup_intervall"),
        (["rules", 0, "expected"], "tokens_per_s_interval", "token_per_s_interval"),
        (["rules", 1, "expected"], "perplexity_ratio", "perplexity-ratio"),
        (["rules", 1, "settings"], "launch", "lauch"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_field_that_is_meant(
    tmp_path: Path, place: list[Any], known: str, misspelt: str
) -> None:
    data = a_policy().model_dump(mode="json")
    at = data
    for step in place:
        at = at[step]
    at[misspelt] = at[known]
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(data))
    write_policy(Policy.load(path), path)  # beside the field itself it is a later version's
    assert json.loads(path.read_text()) == data
    del at[known]
    path.write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=rf"policy\.json: .*unknown field '{misspelt}': write '{known}'"):
        Policy.load(path)


def test_a_policy_of_the_first_version_is_read_and_its_new_fields_are_empty() -> None:
    policy = Policy.load(Path(__file__).parents[2] / "benchmarks" / "recorded" / "run-8b-h200" / "policy.json")
    assert policy.drafts == []
    assert policy.model.files == {}
    assert policy.rules[0].evidence.witness == "NVML, per process"
    assert policy.rules[0].evidence.new_tokens is None


def test_the_interval_is_that_of_all_rounds_together_and_one_round_has_none() -> None:
    rounds = [(98.0, 102.0), (99.0, 101.0)]
    for parts, expected in (([(100.0,)], None), (rounds, (96.36, 103.64)), ([sum(rounds, ())], (96.36, 103.64))):
        policy = policy_of([synthetic_record(FAST, 512, part, stage="final") for part in parts], {512: FAST}, {})
        assert policy is not None
        assert policy.rules[0].expected.tokens_per_s == pytest.approx(100)
        interval = policy.rules[0].expected.tokens_per_s_interval
        assert interval == (None if expected is None else pytest.approx(expected, rel=2e-3))


def test_the_certificate_names_the_files_of_the_draft_that_is_loaded_and_of_no_other() -> None:
    drafts = [{**MODEL, "path": path, "files": {"config.json": "0c"}} for path in ("/models/other", DRAFT)]
    for chosen, named in ((FAST, [DRAFT]), (STOCK, [])):
        policy = make_policy(
            both_finals(chosen, 512, 150),
            {512: chosen},
            {},
            workload=Workload(contexts=(512,)),
            budget=BUDGET,
            model=MODEL,
            drafts=drafts,
            environment={},
            workload_info={},
        )
        assert policy is not None
        assert [draft.path for draft in policy.drafts] == named


def sha256sum(*paths: Path) -> str:
    """What `sha256sum` prints for the files, hashed once more."""
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def test_a_fingerprint_covers_every_byte_of_every_file_that_decides_what_is_computed(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(300_000))
    before = fingerprint(tmp_path)
    assert sorted(before["files"]) == ["config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json"]
    assert before["weights_sha256"] == sha256sum(
        *(tmp_path / name for name in ("model-1.safetensors", "model-2.safetensors", "config.json"))
    )
    assert before["tokenizer_sha256"] == sha256sum(tmp_path / "tokenizer.json")
    for name in before["files"]:
        data = bytearray(kept := (tmp_path / name).read_bytes())
        data[150_000] ^= 1
        (tmp_path / name).write_bytes(data)
        now = fingerprint(tmp_path)
        kind = "tokenizer_sha256" if name == "tokenizer.json" else "weights_sha256"
        assert {key for key in before if before[key] != now[key]} == {"files", kind}
        assert [file for file in now["files"] if now["files"][file] != before["files"][file]] == [name]
        (tmp_path / name).write_bytes(kept)
    assert fingerprint(tmp_path) == before


def test_a_snapshot_of_the_hub_is_known_by_its_name_and_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a-name" / "snapshots" / "8cde5ca8"
    snapshot.mkdir(parents=True)
    assert fingerprint(snapshot)["revision"] == "org/a-name@8cde5ca8"
    (other := snapshot.parents[1] / "refs" / "main").mkdir(parents=True)
    assert fingerprint(other)["revision"] is fingerprint(tmp_path)["revision"] is None


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA_FILE.read_text() == json.dumps(schema(), indent=2) + "\n"


def test_a_policy_is_valid_by_the_published_schema() -> None:
    published = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    assert list(jsonschema.Draft202012Validator(published).iter_errors(a_policy().model_dump(mode="json"))) == []


WRONG: dict[str, tuple[list[Any], Any, str]] = {
    "no rules": (["rules"], [], "rules"),
    "a depth of text": (["rules", 0, "settings", "depth"], "four", "rules.0.settings.depth"),
    "a huge depth": (["rules", 0, "settings", "depth"], 17, "rules.0.settings.depth"),
    "an unknown cache": (["rules", 0, "settings", "cache"], "quantised-4", "rules.0.settings.cache"),
    "unknown weights": (["load", "weights"], "nf4", "load.weights"),
    "an unknown speculation": (["rules", 0, "settings", "speculation"], "eager", "rules.0.settings.speculation"),
    "an unknown launch": (["rules", 1, "settings", "launch"], "rocket", "rules.1.settings.launch"),
    "an unknown draft": (["rules", 1, "settings", "draft"], DRAFT, "rules.1.settings.draft"),
    "a negative budget": (["budget_bytes"], -1, "budget_bytes"),
    "no rate": (["rules", 0, "expected", "tokens_per_s"], 0, "rules.0.expected.tokens_per_s"),
    "no number": (["rules", 0, "expected", "tokens_per_s"], math.nan, "rules.0.expected.tokens_per_s"),
    "a list for a load": (["load"], [], "load"),
}


@pytest.mark.parametrize(("place", "value", "key"), WRONG.values(), ids=WRONG)
def test_an_error_in_a_policy_names_the_file_and_the_key(
    tmp_path: Path, place: list[Any], value: Any, key: str
) -> None:
    data = a_policy().model_dump(mode="json")
    at = data
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(f"{path}: {key}: ")
    if not (isinstance(value, float) and math.isnan(value)):  # JSON has no NaN, so a schema has nothing to say of it
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, json.loads(SCHEMA_FILE.read_text()))


@pytest.mark.parametrize("key", ["model", "budget_bytes", "environment", "workload", "load", "rules", "baseline"])
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    data = a_policy().model_dump(mode="json")
    del data[key]
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=rf"policy\.json: {key}: "):
        Policy.load(tmp_path / "policy.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "policy: "),
        ("null", "policy: "),
        ('{"schema_version": 2}', "2; this autotune reads 1: a newer autotune wrote it: update this one"),
        ('{"schema_version": 0}', "0; this autotune reads 1: run autotune again"),
        ('{"schema_version": "1"}', "'1'; this autotune reads 1: run autotune again"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(PolicyError, match=rf"policy\.json.*{said}"):
        Policy.load(tmp_path / "policy.json")


def test_a_policy_that_is_missing_or_binary_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name in ("binary.json", "missing.json"):
        with pytest.raises(PolicyError, match=rf"{name} cannot be read"):
            Policy.load(tmp_path / name)


def test_rules_that_do_not_ascend_are_refused(tmp_path: Path) -> None:
    data = a_policy().model_dump(mode="json")
    data["rules"].reverse()
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(PolicyError, match="ascending max_context_tokens"):
        Policy.load(tmp_path / "policy.json")


def test_a_rule_with_a_draft_model_that_is_not_loaded_is_refused(tmp_path: Path) -> None:
    data = a_policy().model_dump(mode="json")
    data["load"] |= {"draft": "none", "draft_weights": "none"}
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=r"load\.draft is none"):
        Policy.load(tmp_path / "policy.json")


@given(configurations)
def test_a_configuration_survives_the_policys_load_and_settings(configuration: Configuration) -> None:
    assert to_configuration(load_of(configuration), settings_of(configuration)) == configuration


def test_a_policy_from_before_depths_adapted_reads_as_constant(tmp_path: Path) -> None:
    data = a_policy().model_dump(mode="json")
    for rule in data["rules"]:
        assert rule["settings"].pop("speculation") == "constant"
    (tmp_path / "policy.json").write_text(json.dumps(data))
    published = json.loads(SCHEMA_FILE.read_text())
    jsonschema.validate(data, published)
    policy = Policy.load(tmp_path / "policy.json")
    assert [policy.configuration(rule).speculation for rule in policy.rules] == ["constant"] * len(policy.rules)


def test_an_idle_draft_is_written_as_none_and_stays_loaded() -> None:
    idle = FAST.replace(depth=0)
    assert settings_of(idle).draft == "none"
    assert load_of(idle).draft == DRAFT
    assert to_configuration(load_of(idle), settings_of(idle)).load_group == FAST.load_group


def test_a_depth_without_a_draft_leaves_the_loaded_draft_idle() -> None:
    settings = settings_of(FAST).model_copy(update={"draft": "none"})
    assert to_configuration(load_of(FAST), settings) == FAST.replace(depth=0)


def test_one_load_group_serves_all_rules() -> None:
    contexts = (512, 2048)
    at = {512: FAST, 2048: FAST.replace(depth=0, prefill_chunk=512)}
    records = [r for c in contexts for r in both_finals(at[c], c, 150) + both_finals(STOCK, c, 100)]
    policy = policy_of(records, at, dict.fromkeys(contexts, STOCK))
    assert policy is not None
    assert [policy.configuration(rule) for rule in policy.rules] == [at[512], at[2048]]
    assert {policy.configuration(rule).load_group for rule in policy.rules} == {FAST.load_group}


def test_a_significant_winner_is_chosen_and_its_speedup_said() -> None:
    policy = a_policy((512,))
    (rule,) = policy.rules
    assert chosen_at(policy, 512) == FAST
    assert rule.speedup == pytest.approx(1.5)
    assert rule.speedup_interval is not None
    assert 1.4 < rule.speedup_interval[0] < 1.5 < rule.speedup_interval[1] < 1.6
    assert not rule.tie
    assert rule.note.startswith("1.50 times the baseline")
    assert rule.evidence == Evidence(
        stage="final", measurements=2, witness="resident set", context_tokens=512, new_tokens=128
    )
    assert rule.expected.tokens_per_s == pytest.approx(150)
    (stock,) = policy.baseline
    assert to_configuration(stock.load, stock.settings) == STOCK
    assert stock.expected.tokens_per_s == pytest.approx(100)


def test_a_difference_within_error_keeps_the_baseline_and_says_tie() -> None:
    records = [
        synthetic_record(configuration, 512, rates, stage="final")
        for configuration, rates in [(FAST, (80.0, 103.0, 130.0)), (STOCK, (78.0, 100.0, 128.0))]
        for _ in range(2)
    ]
    policy = policy_of(records, {512: FAST}, {512: STOCK})
    assert policy is not None
    assert chosen_at(policy, 512) == STOCK
    assert policy.rules[0].tie
    assert "the baseline" in policy.rules[0].note


def test_a_winner_at_one_context_is_kept_where_it_ties_or_loses_and_the_rules_say_so() -> None:
    rates = {512: 150.0, 2048: 100.0, 4096: 80.0}
    records = [r for c, rate in rates.items() for r in both_finals(FAST, c, rate) + both_finals(STOCK, c, 100)]
    policy = policy_of(records, dict.fromkeys(rates, FAST), dict.fromkeys(rates, STOCK))
    assert policy is not None
    assert [chosen_at(policy, context) for context in rates] == [FAST] * 3
    assert [rule.tie for rule in policy.rules] == [False, True, False]
    assert policy.rules[1].note.count("a tie") == 1
    assert tied_with(policy, 1) == [STOCK]
    assert "slower than the baseline" in policy.rules[2].note


def test_where_nothing_stock_fits_the_choice_stands_without_a_comparison() -> None:
    policy = policy_of(both_finals(FAST, 512, 10), {512: FAST}, {})
    assert policy is not None
    assert chosen_at(policy, 512) == FAST
    assert policy.rules[0].speedup is None
    assert policy.baseline == []
    assert "nothing stock fits" in policy.rules[0].note


def test_nothing_feasible_makes_no_policy() -> None:
    records = [synthetic_record(FAST, 512, outcome="over_budget"), Record(STOCK, 512, "out_of_memory")]
    assert best_group(records, Workload()) is None
    assert policy_of(records, {}, {}) is None


def of_two_loads() -> Policy:
    records = [r for c in (512, 2048) for r in both_finals(STOCK, c, 100)]
    fast = FAST.replace(draft="prompt-lookup")
    records += both_finals(FAST, 512, 300, load_s=7.0) + both_finals(fast, 2048, 300, load_s=3.0)
    policy = policy_of(records, {512: FAST, 2048: fast}, dict.fromkeys((512, 2048), STOCK), reloads=True)
    assert policy is not None
    return policy


def test_with_reloads_a_rule_has_its_own_load_and_says_how_long_it_takes(tmp_path: Path) -> None:
    write_policy(of_two_loads(), tmp_path / "policy.json")
    policy = Policy.load(tmp_path / "policy.json")
    assert [rule.load for rule in policy.rules] == [load_of(FAST), None]
    assert policy.load_group.draft == "none"
    assert [rule.reload_s for rule in policy.rules] == [7.0, 3.0]
    assert [policy.configuration(rule).draft for rule in policy.rules] == [DRAFT, "prompt-lookup"]
    jsonschema.validate(policy.model_dump(mode="json"), json.loads(SCHEMA_FILE.read_text()))


def test_what_is_printed_says_what_one_load_costs_or_what_a_reload_takes() -> None:
    assert "one load reaches 67% at 512, 100% at 2048 of what was fastest there in the search" in printed(of_one_load())
    said = printed(of_two_loads())
    assert "loads quanto-int4 weights, bf16 lm_head, sdpa attention, draft draft in bf16" in said
    assert "takes 7.0 s at 512, 3.0 s at 2048" in said
    assert "one load reaches" not in said
    rows = [line for line in printed(with_a_boundary()).splitlines() if "1280" in line and "cache" in line]
    assert len(rows) == 1
    assert "does not fit" not in rows[0]


def test_a_loss_below_the_noise_floor_is_printed_as_noise() -> None:
    policy = of_one_load()
    for rule, ratio in zip(policy.rules, (1.0021, 0.9981), strict=True):
        rule.expected.perplexity_ratio = ratio
    assert "within noise" not in printed(policy)
    policy.workload["noise_floor"] = {"512": {"ln_ratio": 0.002, "kl_divergence": 1e-4}}
    said = printed(policy)
    assert said.count("within noise") == 1
    assert "+0.21%" in said


def test_one_load_has_no_reloads() -> None:
    assert [(rule.load, rule.reload_s) for rule in a_policy().rules] == [(None, None)] * 2


def test_a_draft_model_is_looked_for_in_the_load_of_its_rule(tmp_path: Path) -> None:
    data = of_two_loads().model_dump(mode="json")
    data["rules"][0]["load"] |= {"draft": "none", "draft_weights": "none"}
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=r"load\.draft is none"):
        Policy.load(tmp_path / "policy.json")


def of_one_load() -> Policy:
    """FAST for both contexts; OTHER was faster at the short one when it was searched."""
    searched = {FAST: (100, 100), STOCK: (50, 50), OTHER: (150, 90)}
    records = [
        synthetic_record(c, at, around(rate), stage="search")
        for c, rates in searched.items()
        for at, rate in zip((512, 2048), rates, strict=True)
    ]
    records += [r for c in (512, 2048) for r in both_finals(FAST, c, 300) + both_finals(STOCK, c, 200)]
    policy = policy_of(records, dict.fromkeys((512, 2048), FAST), dict.fromkeys((512, 2048), STOCK))
    assert policy is not None
    return policy


def test_a_rule_says_what_would_have_been_fastest_alone_by_the_search() -> None:
    short, long = of_one_load().rules
    assert short.unrestricted is not None
    assert to_configuration(short.unrestricted.load, short.unrestricted.settings) == OTHER
    assert short.unrestricted.tokens_per_s == 150
    assert short.unrestricted.gain == pytest.approx(1.5)
    assert short.unrestricted.stage == "search"
    assert "alone, weights=quanto-int8" in short.note
    assert "1.50 times as fast, by the search's records" in short.note
    assert long.unrestricted is not None
    assert (long.unrestricted.load, long.unrestricted.gain) == (load_of(FAST), 1)
    assert "alone" not in long.note


def with_a_boundary(*further: Record) -> Policy:
    """Two rules that differ, and the settings of the first measured between them."""
    long = FAST.replace(depth=0)
    records = [r for c in (512, 2048) for r in both_finals(STOCK, c, 100)]
    records += both_finals(FAST, 512, 300) + both_finals(long, 2048, 300)
    records += [synthetic_record(FAST, 1280, around(rate), stage="boundary", peak=700 * MIB) for rate in (210, 212)]
    chosen = {512: FAST, 1280: FAST, 2048: long}
    stock = dict.fromkeys((512, 2048), STOCK)
    policy = policy_of([*records, *further], chosen, stock, contexts=(512, 2048))
    assert policy is not None
    return policy


def test_a_boundary_between_contexts_is_a_rule_of_its_own_with_its_own_evidence() -> None:
    policy = with_a_boundary(synthetic_record(FAST.replace(depth=0), 1664, around(250), stage="boundary"))
    assert [rule.max_context_tokens for rule in policy.rules] == [512, 1280, 2048]
    assert [chosen_at(policy, length).depth for length in (512, 513, 1280, 1281)] == [4, 4, 4, 0]
    reach = policy.rules[1]
    assert reach.evidence.stage == "boundary"
    assert reach.expected.tokens_per_s == pytest.approx(211)
    assert reach.expected.peak_bytes == 700 * MIB
    assert (reach.speedup, reach.unrestricted) == (None, None)
    assert "nothing stock" not in reach.note
    assert policy.rules[2].note.endswith("; the change lies between 1280 and 1664 tokens")


def test_where_the_rule_failed_between_contexts_it_says_so() -> None:
    failed = Record(FAST.replace(depth=0), 1664, "wrong_output", stage="boundary")
    assert with_a_boundary(failed).rules[2].note.endswith("; it failed at 1664 tokens")


def test_a_boundary_that_there_was_no_time_to_look_for_is_at_the_context_and_the_rule_says_so() -> None:
    long = FAST.replace(depth=0)
    records = [*both_finals(FAST, 512, 300), *both_finals(long, 2048, 300), *both_finals(long, 4096, 300)]
    policy = policy_of(records, {512: FAST, 2048: long, 4096: long}, {})
    assert policy is not None
    said = [
        "takes over after 512 tokens, as where between 512 and 2048 was not measured" in r.note for r in policy.rules
    ]
    assert said == [False, True, False]


def test_boundaries_take_no_part_in_the_choice_of_a_load_group() -> None:
    records = [synthetic_record(STOCK, c, around(100)) for c in (512, 2048)]
    records += [synthetic_record(FAST, c, around(99)) for c in (512, 2048, 4096)]
    looks = [synthetic_record(STOCK, c, around(900), stage="boundary") for c in (1024, 1280)]
    assert best_group(records + looks, Workload()) == FAST.load_group
    assert choose(records + looks, Workload()) == dict.fromkeys((512, 2048, 4096), FAST)


def test_where_nothing_is_faster_than_baselines_of_two_loads_the_one_that_fits_everywhere_is_kept() -> None:
    small = STOCK.replace(weights="bf16")
    stock, fast = {512: small, 2048: STOCK}, dict.fromkeys((512, 2048), FAST)
    records = [r for c in (512, 2048) for r in both_finals(FAST, c, 100)]
    records += both_finals(small, 512, 101) + both_finals(STOCK, 2048, 100)
    everywhere = synthetic_record(STOCK, 512, around(100))
    assert chosen_at(policy_of(records, fast, stock), 512) == FAST  # nothing of one load that is stock was measured
    kept = policy_of([*records, everywhere], fast, stock)
    assert [chosen_at(kept, c) for c in (512, 2048)] == [STOCK, STOCK]
    slower = synthetic_record(STOCK, 512, around(60))
    assert chosen_at(policy_of([*records, slower], fast, stock), 512) == FAST
    reloading = policy_of(records, fast, stock, reloads=True)
    assert [chosen_at(reloading, c) for c in (512, 2048)] == [small, STOCK]


def test_a_task_is_stated_by_the_first_record_that_was_asked() -> None:
    plain = synthetic_record(FAST, 512)
    figures: dict[str, Any] = {
        "task_exact_match": 0.25,
        "task_f1": 0.64,
        "task_f1_interval": (0.5, 0.78),
        "task_loss": 0.012,
    }
    expected = expected_of([plain, dataclasses.replace(plain, **figures)])
    assert {name: getattr(expected, name) for name in figures} == figures
    assert expected_of([plain]).task_f1 is None
    policy = of_one_load()
    policy.rules[0].expected = expected
    assert "F1 64% (-1.2 points)" in printed(policy)
    assert as_markdown(policy).count("F1 64% (-1.2 points)") == 1


def test_a_tie_with_a_draft_model_that_its_load_lacks_is_refused(tmp_path: Path) -> None:
    policy = policy_of(finals({FAST: 100.0, DEEP: 100.5}), {512: FAST}, {})
    assert policy is not None
    jsonschema.validate(policy.model_dump(mode="json"), json.loads(SCHEMA_FILE.read_text()))
    data = policy.model_dump(mode="json")
    data["rules"][0]["ties"][0]["load"] |= {"draft": "none", "draft_weights": "none"}
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=r"tie uses a draft model, but its load\.draft is none"):
        Policy.load(tmp_path / "policy.json")
    del data["rules"][0]["ties"]
    (tmp_path / "policy.json").write_text(json.dumps(data))
    assert Policy.load(tmp_path / "policy.json").rules[0].ties == []
