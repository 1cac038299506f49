from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from autotune.policy.policy import write_policy
from benchmarks import soak
from tests.policies import bundled_policy


def test_an_answer_to_another_prompt_is_noticed_and_a_tie_is_no_mix_up() -> None:
    alone = [[number * 100 + at for at in range(40)] for number in range(3)]
    tally = soak.Tally()
    tally.judge(1, list(alone[1]), alone)
    assert (tally.mixed_up, tally.differing) == (0, [])
    tally.judge(1, alone[1][:30] + [7] * 10, alone)
    assert (tally.mixed_up, tally.differing) == (0, [30])
    tally.judge(1, list(alone[2]), alone)
    tally.judge(1, alone[0][:20] + [7] * 20, alone)
    assert (tally.mixed_up, tally.differing) == (2, [30])
    tally.judge(1, [*alone[0][:3], *alone[1][:37]], alone)  # too short a likeness to be another's answer
    assert (tally.mixed_up, tally.differing) == (2, [30, 0])


def test_a_request_that_fails_is_counted_as_lost() -> None:
    calls: list[list[int]] = []

    class Broken:
        def stream(self, prompt: list[int]) -> Any:
            calls.append(prompt)
            if len(calls) > 1 and len(calls) % 2:
                raise RuntimeError("out of memory")
            stream: Any = type("Stream", (list,), {})()
            generation = SimpleNamespace(tokens=prompt, ttft_s=0.01, decode_s=0.01)
            stream.request = SimpleNamespace(
                rule=SimpleNamespace(max_context_tokens=64), generation=generation, peak_bytes=1
            )
            return stream

    tally, footprints = soak.soak(Broken(), [[1, 2, 3]], 0.005, 1, 0, Mock(peak=1))  # type: ignore[arg-type]
    assert tally.lost[0] == "3 tokens: RuntimeError: out of memory"
    assert abs(len(tally.lost) - tally.rules.total()) <= 1
    assert len(tally.lost) + tally.rules.total() == len(calls) - 1
    assert footprints[-1][0] >= 0.3


def test_a_policy_soaks_and_every_answer_is_the_one_given_alone(tmp_path: Path) -> None:
    write_policy(bundled_policy(longest=128), tmp_path / "policy.json")
    command = [sys.executable, soak.__file__, str(tmp_path / "policy.json"), "--minutes", "0.05"]
    done = subprocess.run([*command, "--prompts", "4"], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests"] > 0
    assert (figures["lost"], figures["mixed_up"], figures["differing"]) == (0, 0, 0)
    assert set(figures["requests_per_rule"]) <= {"64", "128"}
    assert figures["longest_prompt_tokens"] == 128
    assert figures["instrument"] == "resident set"
    assert 100 * 10**6 < figures["first_minute_peak_bytes"] <= figures["peak_bytes"] <= figures["budget_bytes"]
    assert figures["footprints"]
