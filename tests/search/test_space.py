from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import Configuration
from autotune.search.space import _WORDS as KNOBS
from autotune.search.space import BUILT_IN, CAPTURABLE, Space, SpaceError, read_space, stock_configurations

BUILT_INS = ["default", "published-8gb", "quick", "wide"]
ON_A_GPU: dict[str, Any] = {
    "device": "cuda:0",
    "full_precision": "bf16",
    "drafts": ["/models/draft", "/models/other"],
    "sliding": True,
    "quantized": False,
    "failed": {},
}
ON_A_CPU = ON_A_GPU | {"device": "cpu", "full_precision": "fp32", "drafts": ["/models/draft"], "sliding": False}


class Choices:
    """Answers as an Optuna trial does, from Hypothesis; keeps what was asked."""

    def __init__(self, data: st.DataObject):
        self.data = data
        self.asked: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked[name] = self.data.draw(st.sampled_from(choices), label=name)
        return self.asked[name]


def space_of(folder: Path, text: str) -> Space:
    (folder / "space.toml").write_text(text)
    return read_space(str(folder / "space.toml"))


def restricted(name: str, where: Mapping[str, Any] = ON_A_GPU, **changes: Any) -> Space:
    return read_space(name).restrict(**{**where, **changes})


def small_spaces() -> st.SearchStrategy[Space]:
    """Spaces of one or two choices a knob, as a restricted one is."""
    words: dict[str, list[Any]] = {knob: list(known) for knob, known in KNOBS.items() if known is not None}
    words |= {"draft": ["none", "prompt-lookup", "/a", "/b"], "depth": [1, 2, 5], "prefill_chunk": [0, 512, 2048]}
    some = {k: st.lists(st.sampled_from(words[k]), min_size=1, max_size=2, unique=True).map(tuple) for k in KNOBS}
    spaces = st.fixed_dictionaries(some).map(lambda choices: Space({knob: choices[knob] for knob in KNOBS}))
    # `restrict` takes split_kv out of a space that has no cache for it
    return spaces.filter(
        lambda s: "split_kv" not in s.choices["attention"] or set(s.choices["cache"]) & set(CAPTURABLE)
    )


def is_legal(c: Configuration) -> bool:
    speculates = c.draft == "none" or c.depth >= 1
    fixed = c.cache in CAPTURABLE and c.attention in ("eager", "sdpa", "split_kv")
    captures = c.launch == "eager" or (fixed and "bnb-int8" not in (c.weights, c.draft_weights))
    captures = captures and (c.attention != "split_kv" or c.cache in CAPTURABLE)
    captures = captures and (c.speculation == "constant" or (c.draft != "none" and c.depth > 1))
    as_stored = c.weights != "checkpoint" or (c.lm_head, c.embeddings) == ("bf16", "device")
    return speculates and captures and as_stored


@given(small_spaces(), st.data())
def test_every_suggestion_is_legal_and_asks_only_for_what_has_an_effect(space: Space, data: st.DataObject) -> None:
    trial = Choices(data)
    configuration = space.suggest(trial)
    assert is_legal(configuration)
    assert all(getattr(configuration, name.partition(" of ")[0]) == value for name, value in trial.asked.items())
    assert ("depth" in trial.asked) <= (configuration.draft != "none")
    assert ("draft_weights" in trial.asked) <= configuration.has_draft_model
    assert ("speculation" in trial.asked) <= (configuration.draft != "none" and max(space.choices["depth"]) > 1)


@given(small_spaces(), st.data())
def test_the_parameters_of_a_suggestion_lead_back_to_it(space: Space, data: st.DataObject) -> None:
    trial = Choices(data)
    configuration = space.suggest(trial)
    parameters = space.parameters(configuration)
    assert parameters == trial.asked
    assert space.suggest(optuna.trial.FixedTrial(parameters)) == configuration


@given(small_spaces())
def test_all_configurations_are_legal_different_and_found(space: Space) -> None:
    found = list(space.configurations())
    assert len(set(found)) == len(found) > 0
    assert all(is_legal(c) and space.parameters(c) is not None for c in found)


@given(small_spaces(), st.data())
def test_no_suggestion_is_missing_among_all_configurations(space: Space, data: st.DataObject) -> None:
    assert space.suggest(Choices(data)) in set(space.configurations())


@given(small_spaces(), small_spaces(), st.data())
def test_a_configuration_of_another_space_is_found_only_if_it_is_in_this_one(
    space: Space, other: Space, data: st.DataObject
) -> None:
    configuration = other.suggest(Choices(data))
    assert (space.parameters(configuration) is not None) == (configuration in set(space.configurations()))


@given(small_spaces())
def test_an_adaptive_depth_is_the_largest_of_its_space_and_adds_no_others(space: Space) -> None:
    depths = {c.depth for c in space.configurations() if c.speculation == "adaptive"}
    expected = {max(space.choices["depth"])} - {1}
    assert depths <= expected
    if "adaptive" in space.choices["speculation"] and set(space.choices["draft"]) != {"none"}:
        assert depths == expected
    if space.choices["speculation"] == ("adaptive",) and expected:
        assert all(c.depth == max(expected) for c in space.configurations() if c.draft != "none")


def test_an_idle_draft_model_is_no_suggestion() -> None:
    space = restricted("published-8gb")
    used = next(c for c in space.configurations() if c.has_draft_model)
    assert space.parameters(used) is not None
    assert space.parameters(used.replace(depth=0)) is None


@pytest.mark.parametrize("name", BUILT_INS)
@pytest.mark.parametrize("where", [ON_A_GPU, ON_A_CPU], ids=["gpu", "cpu"])
def test_the_built_in_spaces_can_be_read_and_run(name: str, where: dict[str, Any]) -> None:
    space = restricted(name, where)
    assert list(space.choices) == list(KNOBS)
    assert is_legal(next(space.configurations()))


def test_the_built_in_spaces_are_those_that_are_tested() -> None:
    assert sorted(path.stem for path in BUILT_IN.glob("*.toml")) == BUILT_INS


def test_the_published_space_is_four_configurations_with_one_draft() -> None:
    found = list(restricted("published-8gb", drafts=["/models/draft"]).configurations())
    assert {(c.draft, c.depth, c.cache) for c in found} == {
        ("none", 0, "dynamic"),
        ("none", 0, "quantized-4"),
        ("/models/draft", 5, "dynamic"),
        ("/models/draft", 5, "quantized-4"),
    }
    assert len(found) == 4
    assert {c.weights for c in found} == {"bnb-nf4"}


def test_a_knob_that_is_left_out_stays_at_its_default(tmp_path: Path) -> None:
    space = space_of(tmp_path, '[cache]\nchoices = ["static"]\n')
    assert list(space.configurations()) == [Configuration(cache="static")]


def test_low_and_high_are_both_among_the_choices_and_repeats_are_not(tmp_path: Path) -> None:
    space = space_of(tmp_path, "[depth]\nlow = 2\nhigh = 5\n[prefill_chunk]\nchoices = [512, 0, 512]\n")
    assert space.choices["depth"] == (2, 3, 4, 5)
    assert space.choices["prefill_chunk"] == (512, 0)


ERRORS = {
    "unknown knob": ("[wieghts]\nchoices = ['bf16']", ["[wieghts]", "weights"]),
    "unknown key": ("[depth]\nchoices = [2]\nstep = 2", ["depth.step", "choices"]),
    "unknown word": ("[weights]\nchoices = ['bf16', 'nf4']", ["weights.choices", "'nf4'", "bnb-nf4"]),
    "a model by name": ("[draft]\nchoices = ['/models/draft']", ["draft.choices", "model"]),
    "low above high": ("[depth]\nlow = 5\nhigh = 2", ["depth.low", "depth.high"]),
    "low without high": ("[depth]\nlow = 5", ["depth.low", "depth.high"]),
    "a range of words": ("[weights]\nlow = 1\nhigh = 2", ["[weights]", "choices", "bnb-nf4"]),
    "a bool for a count": ("[depth]\nchoices = [true]", ["depth", "True"]),
    "a bool for an end": ("[depth]\nlow = true\nhigh = 4", ["depth.low"]),
    "a bool for a word": ("[cache]\nchoices = [true]", ["cache.choices", "True"]),
    "a fraction": ("[depth]\nchoices = [2.5]", ["depth", "2.5"]),
    "a negative count": ("[prefill_chunk]\nchoices = [-1]", ["prefill_chunk", "-1"]),
    "a word for a count": ("[depth]\nchoices = ['4']", ["depth", "'4'"]),
    "an empty list": ("[cache]\nchoices = []", ["cache.choices"]),
    "no list": ("[cache]\nchoices = 'static'", ["cache.choices"]),
    "a nested list": ("[cache]\nchoices = [['static']]", ["cache.choices", "['static']"]),
    "no table": ("cache = ['static']", ["cache must be a table"]),
    "an empty table": ("[cache]", ["[cache]", "choices"]),
    "choices and low": ("[depth]\nchoices = [2]\nlow = 1", ["[depth]", "either"]),
    "unknown speculation": ("[speculation]\nchoices = ['heuristic']", ["speculation.choices", "adaptive"]),
    "depth 0": ("[depth]\nchoices = [0]", ["depth has 0", "1 to 16"]),
    "depth 17": ("[depth]\nlow = 1\nhigh = 17", ["depth has 17", "1 to 16"]),
    "a huge depth": ("[depth]\nlow = 1\nhigh = 1000000000000", ["depth has 1000000000000"]),
    "a huge range": ("[prefill_chunk]\nlow = 0\nhigh = 1000000000000", ["prefill_chunk.low", "choices"]),
    "invalid TOML": ("[cache\nchoices = ['static']", ["not valid TOML", "line 1"]),
}


@pytest.mark.parametrize(("text", "named"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_a_space_names_the_file_and_the_key(tmp_path: Path, text: str, named: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        space_of(tmp_path, text)
    for part in [str(tmp_path / "space.toml"), *named]:
        assert part in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match=r"space\.toml is not valid TOML"):
        read_space(str(tmp_path / "space.toml"))


def test_a_folder_is_no_space(tmp_path: Path) -> None:
    (tmp_path / "space.toml").mkdir()
    with pytest.raises(SpaceError, match=r"space\.toml cannot be read"):
        read_space(str(tmp_path / "space.toml"))


@pytest.mark.parametrize("name", ["defualt", "missing/space.toml"])
def test_a_space_that_does_not_exist_lists_those_that_do(name: str) -> None:
    with pytest.raises(SpaceError, match=name) as caught:
        read_space(name)
    assert all(known in str(caught.value) for known in BUILT_INS)


def test_what_cannot_run_on_a_cpu_is_dropped_with_its_reason() -> None:
    space = restricted("wide", ON_A_CPU)
    assert space.choices["launch"] == ("eager",)
    assert space.choices["embeddings"] == ("device",)
    assert "offloaded" not in space.choices["cache"]
    dropped = {(knob, word): reason for knob, word, reason in space.dropped}
    assert dropped["launch", "graph"] == "it needs an NVIDIA GPU"
    assert dropped["cache", "offloaded"] == dropped["embeddings", "host"] == "the device is the host already"
    assert dropped["cache", "sliding"] == "the model has no sliding-window layers"
    assert dropped["weights", "checkpoint"] == "the checkpoint is not quantized"


@given(st.sampled_from(BUILT_INS), st.booleans(), st.booleans(), st.sampled_from([ON_A_GPU, ON_A_CPU]))
def test_every_word_is_either_kept_or_dropped_with_a_reason(
    name: str, sliding: bool, with_draft: bool, where: dict[str, Any]
) -> None:
    where = where | {"sliding": sliding, "drafts": where["drafts"] if with_draft else []}
    space, left = read_space(name), read_space(name).restrict(**where)
    dropped = {(knob, word) for knob, word, reason in left.dropped if reason}
    for knob, choices in space.choices.items():
        for word in choices:
            if word == "model":
                expected = (
                    set(where["drafts"]) <= set(left.choices["draft"]) if with_draft else ("draft", "model") in dropped
                )
                assert expected
            else:
                fp32 = "fp32" if word == "bf16" and where["full_precision"] == "fp32" else word
                assert (fp32 in left.choices[knob]) != ((knob, str(fp32)) in dropped)


def test_what_failed_the_probe_is_dropped_with_what_it_said() -> None:
    weights = {"bnb-nf4": "no kernel", "quanto-int4": "no compiler"}
    failed = {"weights": weights, "attention": {"flash_attention_2": "not installed"}}
    space = restricted("wide", failed=failed)
    assert "bnb-nf4" not in space.choices["weights"] + space.choices["draft_weights"]
    assert "nf4" not in space.choices["lm_head"]
    assert "flash_attention_2" not in space.choices["attention"]
    assert ("lm_head", "nf4", "no kernel") in space.dropped
    assert ("lm_head", "int4", "no compiler") in space.dropped
    assert ("attention", "flash_attention_2", "not installed") in space.dropped


def test_where_the_model_has_no_sdpa_the_baseline_and_what_was_not_asked_for_are_eager(tmp_path: Path) -> None:
    failed = {"attention": {"sdpa": "transformers' gemma2 has no sdpa"}}
    for toml in (
        "",
        '[attention]\nchoices = ["eager"]\n',
        '[cache]\nchoices = ["dynamic"]\n[attention]\nchoices = ["split_kv", "sdpa"]\n',
    ):
        space = space_of(tmp_path, toml).restrict(**(ON_A_CPU | {"device": "cuda", "failed": failed}))
        assert space.choices["attention"] == ("eager",)
        assert {configuration.attention for configuration in stock_configurations("bf16", space)} == {"eager"}
    with pytest.raises(SpaceError, match=r"\[attention\].*flash_attention_2: not installed"):
        space_of(tmp_path, '[attention]\nchoices = ["flash_attention_2"]\n').restrict(
            **(ON_A_CPU | {"failed": {"attention": {"flash_attention_2": "not installed"}}})
        )


def test_a_knob_with_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(SpaceError, match=r"\[weights\].*bnb-nf4: no kernel"):
        restricted("published-8gb", failed={"weights": {"bnb-nf4": "no kernel"}})


def test_without_bf16_arithmetic_both_full_precisions_are_one_choice(tmp_path: Path) -> None:
    space = space_of(tmp_path, '[weights]\nchoices = ["bf16", "fp32", "bnb-nf4"]\n').restrict(**ON_A_CPU)
    assert space.choices["weights"] == ("fp32", "bnb-nf4")
    assert space.choices["lm_head"] == ("fp32",)


def test_every_draft_that_is_given_is_a_choice() -> None:
    assert restricted("quick").choices["draft"] == ("none", "prompt-lookup", "/models/draft", "/models/other")


def test_a_draft_model_that_is_not_given_is_dropped_with_the_option_that_gives_it() -> None:
    space = restricted("quick", drafts=[])
    assert space.choices["draft"] == ("none", "prompt-lookup")
    assert ("draft", "model", "no --draft is given") in space.dropped


@pytest.mark.parametrize("name", BUILT_INS)
def test_a_quantized_checkpoint_is_loaded_as_it_is_in_every_space(name: str) -> None:
    space = restricted(name, quantized=True)
    assert space.choices["weights"] == ("checkpoint",)
    assert {word for knob, word, _ in space.dropped if knob == "weights"} == set(
        read_space(name).choices["weights"]
    ) - {"checkpoint"}
    configuration = next(space.configurations())
    assert (configuration.weights, configuration.lm_head, configuration.embeddings) == ("checkpoint", "bf16", "device")


def test_int8_weights_are_never_captured_into_a_graph() -> None:
    space = restricted("wide")
    narrowed = Space({**space.choices, "weights": ("bnb-int8",), "cache": CAPTURABLE, "depth": (4,)})
    assert {c.launch for c in narrowed.configurations()} == {"eager"}


@pytest.mark.parametrize("name", BUILT_INS)
@pytest.mark.parametrize("where", [ON_A_GPU, ON_A_CPU])
def test_what_is_tried_first_is_legal_and_one_for_each_weights_and_draft_on_a_gpu_whole_before_chunked(
    name: str, where: dict[str, Any]
) -> None:
    space = restricted(name, where)
    first = list(space.seeds())
    assert all(is_legal(configuration) and space.parameters(configuration) is not None for configuration in first)
    assert len({(c.weights, c.draft, c.prefill_chunk) for c in first}) == len(first)
    heads = {c.lm_head for c in first if c.weights == "quanto-int4"}
    assert heads <= ({"int4"} if "int4" in space.choices["lm_head"] else {"bf16", "fp32"})
    assert len({(c.weights, c.draft) for c in first}) == len(space.choices["weights"]) * len(space.choices["draft"])
    chunked = {
        weights: [c.prefill_chunk for c in first if c.weights == weights] for weights in space.choices["weights"]
    }
    packed = chunked.keys() - {"bf16", "fp32"}
    if where == ON_A_GPU and len(space.choices["prefill_chunk"]) > 1:
        assert all(chunked[weights][0] == 0 < chunked[weights][1] for weights in packed)
    else:
        assert all(len(set(chunks)) == 1 for chunks in chunked.values())


@given(small_spaces(), st.data())
def test_neighbours_are_in_the_space(space: Space, data: st.DataObject) -> None:
    here = space.suggest(Choices(data))
    assert set(space.neighbours(here)) <= set(space.configurations()) - {here}


def test_neighbours_are_legal_and_differ_in_one_word_or_what_follows_from_it() -> None:
    space = read_space("wide").restrict(
        device="cuda:0", full_precision="bf16", drafts=["d"], sliding=False, quantized=False, failed={}
    )
    here = Configuration(weights="bnb-nf4", cache="static", attention="split_kv", launch="graph")
    found = list(space.neighbours(here))
    assert all(space.parameters(configuration) is not None for configuration in found)
    assert here not in found
    assert {c.cache for c in found} == {"static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8"}
    assert {c.draft for c in found} == {"none", "prompt-lookup", "d"}
    assert here.replace(launch="eager") in found
    assert here.replace(weights="bnb-int8", launch="eager") in found  # a graph cannot hold it
