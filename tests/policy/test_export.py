"""What a policy becomes elsewhere: files that stock transformers really runs, and a table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.cli import main
from autotune.config import MIB, Workload
from autotune.demo import DRAFT, TARGET, held_out_text
from autotune.engine.decode import Engine
from autotune.engine.support import full_precision
from autotune.policy.export import as_markdown, as_transformers
from autotune.policy.policy import Baseline, Expected, Load, ModelInfo, Policy, Rule, Settings, write_policy

WORDS = full_precision("cpu")
SHORT, LONG = held_out_text()[:120], held_out_text()[:350]  # under the first rule, under the second


def policy(*rules: dict[str, Any], environment: dict[str, Any] | None = None, **load: Any) -> Policy:
    """A policy with a rule up to 64, 128, ... tokens for each of the settings."""
    plain = {"weights": WORDS, "lm_head": WORDS, "embeddings": "device", "attention": "sdpa"}
    settings = {"draft": "none", "depth": 0, "cache": "dynamic", "prefill_chunk": 0, "launch": "eager"}
    expected = Expected(
        tokens_per_s=80.0,
        tokens_per_s_interval=(75.0, 85.0),
        decode_tokens_per_s=90.0,
        ttft_s=0.1,
        peak_bytes=500 * MIB,
        perplexity_ratio=1.01,
        perplexity_ratio_interval=(1.0, 1.02),
    )
    return Policy(
        model=ModelInfo(path=str(TARGET), weights_sha256="", tokenizer_sha256=""),
        budget_bytes=2000 * MIB,
        environment={"device_word": "cpu", "device": "a CPU", "full_precision": WORDS, "versions": {"torch": "2"}}
        | (environment or {}),
        workload=json.loads(json.dumps(dataclasses.asdict(Workload(contexts=(64, 128), new_tokens=16)))),
        load=Load(**{**plain, "draft": "none", "draft_weights": "none", **load}),
        rules=[
            Rule(max_context_tokens=64 << i, settings=Settings(**(settings | rule)), expected=expected, speedup=1.5)
            for i, rule in enumerate(rules)
        ],
        baseline=[],
    )


def run(text: str) -> dict[str, Any]:
    """The written file's names, after it has loaded its models."""
    names: dict[str, Any] = {"__name__": "written"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of themselves while they load
        exec(compile(text, "written.py", "exec"), names)
    return names


def generate(names: dict[str, Any], prompt: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(names["generate"](prompt))


def by_the_engine(policy: Policy, prompt: str) -> str:
    """What autotune's own engine writes under the rule of the prompt's length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy.model.path)
    tokens = tokenizer(prompt)["input_ids"]
    configuration = policy.configuration(policy.rule_for(len(tokens)))
    engine = Engine.load(policy.model.path, configuration.load_group, "cpu")
    found = engine.generate(tokens, configuration, 16, stop=engine.stop_tokens)
    return str(tokenizer.decode(found.tokens, skip_special_tokens=True))


def test_a_file_writes_what_the_engine_writes_for_unquantized_weights() -> None:
    plain = policy({}, {"cache": "static"})
    names = run(as_transformers(plain))
    for prompt in (SHORT, LONG):
        assert generate(names, prompt) == by_the_engine(plain, prompt)
    with pytest.raises(ValueError, match=r"measured up to 128"):
        generate(names, held_out_text()[:2000])


SPECULATION = {"draft": "prompt-lookup", "depth": 3}
POLICIES: dict[str, tuple[Policy, list[str], str]] = {
    "nf4": (policy({}, {"cache": "static"}, weights="bnb-nf4", lm_head="nf4"), ["lm_head stays"], "Linear4bit"),
    "int8 by bitsandbytes": (policy({}, {}, weights="bnb-int8"), [], "Linear8bitLt"),
    "quanto-int8": (policy({}, SPECULATION, weights="quanto-int8"), [], "QLinear"),
    "prompt lookup": (
        policy(SPECULATION, SPECULATION | {"cache": "static", "prefill_chunk": 64}),
        ["for prompts up to 128: the cache grows", "for prompts up to 128: the prompt is prefilled whole"],
        "",
    ),
    "a draft model": (
        policy({"draft": "model", "depth": 2}, {"draft": "model", "depth": 4}, draft=str(DRAFT), draft_weights=WORDS),
        [],
        "",
    ),
    "an nf4 draft model": (
        policy({}, {"draft": "model", "depth": 4}, draft=str(DRAFT), draft_weights="bnb-nf4"),
        [],
        "",
    ),
    "an idle draft model": (policy({}, {}, draft=str(DRAFT), draft_weights=WORDS), ["the draft model is not"], ""),
    "quantized caches": (
        policy({"cache": "quantized-4", "prefill_chunk": 32}, SPECULATION | {"cache": "quantized-2"}),
        ["for prompts up to 64, 128: each time 128 tokens", "for prompts up to 128: no speculation (depth 3)"],
        "",
    ),
    "an adaptive depth": (
        policy({}, {**SPECULATION, "speculation": "adaptive"}),
        ["for prompts up to 128: speculation is always 3 tokens deep"],
        "",
    ),
    "8-bit caches": (
        policy({"cache": "quantized-8"}, {"cache": "quantized-fp8", "prefill_chunk": 64}),
        ["for prompts up to 64: the cache is fp8", "for prompts up to 128: the fp8 cache has one scale"],
        "",
    ),
}


def test_a_quantized_checkpoint_names_the_package_that_transformers_loads_it_with() -> None:
    assert "needs its method's package (gptqmodel for GPTQ and AWQ)" in as_transformers(
        policy({}, weights="checkpoint")
    )
    assert "gptqmodel" not in as_transformers(policy({}))


@pytest.mark.usefixtures("uncompiled_quanto")
@pytest.mark.parametrize(("policy", "lost", "layer"), POLICIES.values(), ids=POLICIES)
def test_a_file_loads_and_generates_and_says_what_it_cannot(policy: Policy, lost: list[str], layer: str) -> None:
    text = as_transformers(policy)
    names = run(text)
    said = text.split('"""')[1].partition("otherwise:")[2].strip().splitlines()
    assert len(said) == max(1, len(lost)), said
    for words in lost or ["nothing"]:
        assert any(line.startswith(f"- {words}") for line in said), said
    kinds = {type(module).__name__ for module in names["model"].modules()}
    assert layer in kinds | {""}
    for prompt in (SHORT, LONG):
        assert len(generate(names, prompt).strip()) > 3


@pytest.mark.parametrize(
    ("chosen", "used"),
    [
        (SPECULATION, "prompt_lookup_num_tokens"),
        ({"draft": "model", "depth": 3}, "assistant_model"),
        ({"cache": "static"}, "cache_implementation"),
        ({"cache": "quantized-4"}, "cache_config"),
        ({"prefill_chunk": 64}, "prefill_chunk_size"),
    ],
)
def test_the_rules_settings_reach_generate(chosen: dict[str, Any], used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(as_transformers(policy({}, chosen, draft=str(DRAFT), draft_weights=WORDS)))
    given: list[dict[str, Any]] = []
    stock = type(names["model"]).generate

    def watched(model: Any, **settings: Any) -> Any:
        given.append(settings)
        return stock(model, **settings)

    monkeypatch.setattr(type(names["model"]), "generate", watched)
    for prompt in (SHORT, LONG):
        generate(names, prompt)
    mine = [settings for settings in given if "input_ids" in settings and settings.get("max_new_tokens") == 16]
    assert [used in settings for settings in mine[:1] + mine[-1:]] == [False, True]
    if used == "assistant_model":
        assert names["assistant"].generation_config.num_assistant_tokens == 3


def test_the_written_file_runs_by_itself_as_a_command(tmp_path: Path) -> None:
    write_policy(policy({}, SPECULATION), tmp_path / "policy.json")
    words = ["export", str(tmp_path / "policy.json"), "--format", "transformers", "--to", str(tmp_path / "run.py")]
    assert CliRunner().invoke(main, words).exit_code == 0
    command = [sys.executable, str(tmp_path / "run.py"), SHORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert done.stdout.strip()


def test_a_gpus_policy_caps_the_allocator_and_says_what_is_autotunes_own() -> None:
    gpu = {"device_word": "cuda:0", "base_bytes": 600 * MIB, "full_precision": "bf16"}
    rules = ({"cache": "static", "launch": "graph"}, {"launch": "compile"}, SPECULATION | {"launch": "graph"})
    text = as_transformers(
        policy(*rules, environment=gpu, weights="quanto-int4", attention="split_kv", embeddings="host")
    )
    compile(text, "written.py", "exec")
    assert f"set_per_process_memory_fraction({1400 * MIB} / " in text
    assert 'attn_implementation="sdpa"' in text
    assert "'disable_compile'" not in text.partition(" 64: ")[2].partition("\n")[0]
    assert text.count("'disable_compile': True") == 2
    for words in (
        "embeddings are on the device",
        "split_kv, which reads",
        "not merged",
        "int4 products",
        "up to 64: no recorded CUDA graphs: torch.compile",
        "up to 128: not compiled",
        "up to 256: no recorded CUDA graphs: every kernel",
    ):
        assert words in text, words


def test_a_model_of_the_hub_is_loaded_by_its_name_and_commit() -> None:
    commit = "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"
    of_the_hub = policy({"draft": "model", "depth": 2}, draft="/drafts/one", draft_weights=WORDS)
    of_the_hub.model.revision = f"org/name@{commit}"
    of_the_hub.drafts = [ModelInfo(path="/drafts/one", revision="org/small@ab", weights_sha256="", tokenizer_sha256="")]
    text = as_transformers(of_the_hub)
    compile(text, "written.py", "exec")
    assert "MODEL = 'org/name'" in text
    assert text.count(f'MODEL, revision="{commit}"') == 2
    assert "'org/small', revision=\"ab\"" in text
    assert str(TARGET) not in text


def test_the_table_for_a_readme() -> None:
    known = policy({}, SPECULATION | {"cache": "static", "prefill_chunk": 512})
    first, second = known.rules
    known.baseline = [
        Baseline(context_tokens=64, load=known.load_group, settings=first.settings, expected=first.expected),
    ]
    second.speedup_interval, second.tie = (0.9, 2.1), True
    second.expected = second.expected.model_copy(
        update={"tokens_per_s_interval": None, "perplexity_ratio": None, "tokens_per_s": 7.25}
    )
    head, *table, end = [line for line in as_markdown(known).splitlines() if line]
    assert head.startswith("target on a CPU, budget 2,000 MiB, 16 new tokens a request. Loaded once: ")
    assert table[2:] == [
        "| 64 | dynamic cache, eager | 80.0 (75.0 to 85.0) | 80.0 (75.0 to 85.0) | 1.50 | 500 MiB (25%) "
        "| +1.00% (+0.00% to +2.00%) |",
        "| 128 | static cache, eager, prompt-lookup x 3, chunks of 512 | 7.2 | does not fit "
        "| 1.50 (0.90 to 2.10), a tie | 500 MiB (25%) | not measured |",
    ]
    assert {line.count("|") for line in table} == {8}
    second.settings.speculation = "adaptive"
    assert "static cache, eager, prompt-lookup x up to 3, chunks of 512" in as_markdown(known)
    assert end == "Intervals are 95 %. Measured with torch 2."


def test_export_reads_a_policy_file_and_refuses_what_is_none(tmp_path: Path) -> None:
    write_policy(policy({}), tmp_path / "policy.json")
    ask = [main, ["export", str(tmp_path / "policy.json"), "--format", "markdown"]]
    assert CliRunner().invoke(*ask).stdout == as_markdown(policy({}))
    again = CliRunner().invoke(main, ["export", str(tmp_path / "policy.json")])
    assert again.stdout == (tmp_path / "policy.json").read_text()
    for words in (["--format", "csv"], ["--format", "yaml"]):
        refused = CliRunner().invoke(main, ["export", str(tmp_path / "policy.json"), *words])
        assert refused.exit_code == 2
        assert refused.output.strip().splitlines()[-1].startswith("Error: ")
    missing = CliRunner().invoke(main, ["export", str(tmp_path / "missing.json"), "--format", "transformers"])
    assert missing.exit_code == 2
    assert "missing.json cannot be read" in missing.output


def test_export_of_a_policy_needs_no_torch(tmp_path: Path) -> None:
    write_policy(policy({}), tmp_path / "policy.json")
    code = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    code += "from autotune.cli import main\nmain()"
    words = ["export", str(tmp_path / "policy.json"), "--format", "transformers"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip().endswith("False")
