from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from autotune import cli
from autotune.config import Configuration, Workload
from autotune.demo import DRAFT, TARGET, held_out_text
from autotune.deploy import deploy
from autotune.engine.decode import Engine
from autotune.engine.load import full_precision
from autotune.policy import Expected, Load, ModelInfo, Policy, PolicyError, Rule, Settings, write_policy
from autotune.run import fingerprint
from autotune.verify import verify_policy

WORDS = full_precision("cpu")


def rule(longest: int, **settings: Any) -> Rule:
    chosen = {"draft": "none", "depth": 0, "cache": "dynamic", "prefill_chunk": 0, "launch": "eager"} | settings
    expected = Expected(
        tokens_per_s=1.0, tokens_per_s_interval=(0.1, 2.0), decode_tokens_per_s=1.0, ttft_s=1.0, peak_bytes=1
    )
    return Rule(max_context_tokens=longest, settings=Settings(**chosen), expected=expected)


def policy(folder: Path = TARGET, budget: int = 2 * 10**9) -> Policy:
    return Policy(
        model=ModelInfo(**fingerprint(folder)),
        budget_bytes=budget,
        environment={"device_word": "cpu"},
        workload=json.loads(json.dumps(dataclasses.asdict(Workload(contexts=(64, 128), new_tokens=16)))),
        load=Load(
            weights=WORDS,
            lm_head=WORDS,
            embeddings="device",
            draft=str(DRAFT),
            draft_weights=WORDS,
            attention="sdpa",
        ),
        rules=[rule(64, cache="static"), rule(128, cache="quantized-8", draft="model", depth=3)],
        baseline=[],
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    group = Configuration(weights=WORDS, lm_head=WORDS, draft=str(DRAFT), draft_weights=WORDS).load_group
    return Engine.load(str(TARGET), group, "cpu")


def test_a_deployed_policy_writes_what_the_measured_engine_writes_under_the_rule_of_the_length(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)  # this process holds the tests as well
    write_policy(policy(), tmp_path / "policy.json")
    llm = deploy(tmp_path / "policy.json")
    for prompt, limit in ((held_out_text()[:120], 64), (held_out_text()[:350], 128)):
        text = llm.generate(prompt)
        tokens = llm.tokenizer(prompt)["input_ids"]
        assert llm.last.rule.max_context_tokens == limit
        assert (len(tokens) <= 64) == (limit == 64)
        expected = engine.generate(tokens, llm.policy.configuration(llm.last.rule), 16, stop=llm._stop_tokens())
        assert text == llm.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert llm.last.generation.tokens == expected.tokens
    assert llm.last.generation.proposed > 0
    assert "rule up to 128" in llm.last.summary()
    pieces = list(llm.stream(held_out_text()[:350]))
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_lengths_that_were_not_measured_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)
    llm = deploy(policy())
    with pytest.raises(PolicyError, match="measured up to 128"):
        llm.generate(held_out_text()[:2000])
    with pytest.raises(PolicyError, match="measured with 16"):
        llm.generate("def", new_tokens=17)
    with pytest.raises(PolicyError, match="empty"):
        llm.generate("")
    assert llm.generate("def", new_tokens=1)  # a refusal leaves it usable


def test_a_policy_of_another_place_is_refused_with_what_to_mend(tmp_path: Path) -> None:
    moved = policy().model_copy(update={"model": ModelInfo(path="/no/such", weights_sha256="", tokenizer_sha256="")})
    with pytest.raises(PolicyError, match=r"edit model\.path"):
        deploy(moved)
    if not torch.cuda.is_available():
        with pytest.raises(PolicyError, match="no GPU"):
            deploy(policy(), device="cuda:0")


def test_generate_keeps_the_budget_and_prints_the_text(tmp_path: Path) -> None:
    write_policy(policy(), tmp_path / "policy.json")
    command = [sys.executable, "-m", "autotune.cli", "generate", str(tmp_path / "policy.json"), "--prompt", "-"]
    done = subprocess.run(command, input="def main():", capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr
    small = policy(budget=100 * 10**6)  # less than the libraries alone hold
    write_policy(small, tmp_path / "policy.json")
    done = subprocess.run(command, input="def main():", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "the budget is" in done.stderr


def test_verify_holds_here_and_names_the_claim_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.trial.BUSY", 1.0)  # others may run beside
    write_policy(policy(), tmp_path / "policy.json")
    verdicts = verify_policy(tmp_path / "policy.json")
    assert all(verdict.holds for verdict in verdicts), verdicts
    assert {"up to 64: footprint", "up to 128: footprint", "up to 128: tokens/s"} <= {v.claim for v in verdicts}
    greedy = policy()
    greedy.rules[0].expected.tokens_per_s_interval = (10**6, 10**6 + 1)
    write_policy(greedy, tmp_path / "policy.json")
    failed = [verdict.claim for verdict in verify_policy(tmp_path / "policy.json") if not verdict.holds]
    assert failed == ["up to 64: tokens/s"]


def test_verify_fails_for_a_budget_that_is_too_low_and_for_another_model(tmp_path: Path) -> None:
    write_policy(policy(budget=300 * 10**6), tmp_path / "policy.json")
    result = CliRunner().invoke(cli.main, ["verify", str(tmp_path / "policy.json"), "--json"])
    assert result.exit_code == 1
    failed = [row for row in json.loads(result.stdout) if not row["holds"]]
    assert {row["claim"] for row in failed} == {"up to 64: runs", "up to 128: runs"}
    changed = policy()
    changed.model.weights_sha256 = "0" * 64
    write_policy(changed, tmp_path / "policy.json")
    result = CliRunner().invoke(cli.main, ["verify", str(tmp_path / "policy.json")])
    assert result.exit_code == 1
    assert "weights sha256" in result.stdout
    assert "FAILS" in result.stdout


def test_plan_predicts_without_torch_and_says_what_fits() -> None:
    code = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    code += "from autotune.cli import main\nmain()"
    command = [sys.executable, "-c", code, "plan", "--budget", "560MB", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = json.loads(done.stdout)
    assert done.stderr.strip().endswith("False")
    totals = [row["contexts"]["4096"]["total_bytes"] for row in rows]
    assert totals == sorted(totals)
    for row in rows:
        for context in row["contexts"].values():
            assert context["total_bytes"] == sum(context["owners"].values())
        fits = row["largest_context_tokens"]
        assert (fits >= 4096) == (row["contexts"]["4096"]["total_bytes"] <= 560 * 10**6)
    layers = CliRunner().invoke(cli.main, ["plan", "--budget", "1GB", "--device", "cpu", "--by-layer", "--json"])
    assert len(json.loads(layers.stdout)) >= 8
