"""The judgement of repeated runs, and that each has processors of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.policy.policy import Policy, write_policy
from benchmarks import repeats
from tests.policies import bundled_policy


def chose(
    cache: str,
    chunk: int = 0,
    ties: tuple[str, ...] = (),
    rate: float = 1.0,
    times: float = 2.0,
    stage: str = "final",
) -> Policy:
    """A policy that chooses one cache at 64 tokens, and declares others to be ties."""
    data = bundled_policy().model_dump(mode="json")
    rule = data["rules"][0]
    rule["settings"] |= {"cache": cache, "prefill_chunk": chunk}
    rule["expected"]["tokens_per_s"], rule["speedup"] = rate, times
    rule["ties"] = [
        {"load": data["load"], "settings": rule["settings"] | {"cache": tie}, "tokens_per_s": 1.0, "gain": 1.0}
        | {"stage": stage}
        for tie in ties
    ]
    return Policy.model_validate(data)


def test_a_choice_agrees_by_itself_or_by_a_tie_that_either_side_declares() -> None:
    row = repeats.judge([chose("static"), chose("static", ties=("dynamic",)), chose("dynamic")], 64)
    assert (row["same"], row["declare_it"], row["declared_by_it"], row["agree"]) == (2, 0, 1, 3)
    static, tied = [chose("static")] * 3, chose("dynamic", ties=("static",))
    row = repeats.judge([*static, tied, chose("dynamic")], 64)
    assert (row["same"], row["declare_it"], row["declared_by_it"], row["agree"]) == (3, 1, 0, 4)
    assert "static cache" in row["choice"]
    both = [chose("static", ties=("dynamic",)), chose("static"), chose("dynamic", ties=("static",))]
    assert repeats.judge(both, 64)["agree"] == 3


def test_a_tie_of_another_load_agrees_too() -> None:
    other, tied = chose("static"), chose("static", ties=("static",))
    other.load_group.weights = "bnb-nf4"
    assert repeats.judge([chose("static"), other], 64)["agree"] == 1
    tied.rules[0].ties[0].load.weights = "bnb-nf4"
    assert repeats.judge([tied, other], 64)["agree"] == 2


def test_what_agrees_with_neither_and_what_made_no_policy_are_counted_against_it() -> None:
    row = repeats.judge([chose("static"), chose("static"), chose("dynamic", ties=("quantized-8",)), None], 64)
    assert (row["repeats"], row["same"], row["agree"]) == (4, 2, 2)
    assert repeats.judge([None, None], 64)["agree"] == 0
    beyond = repeats.judge([chose("static")], 4096)  # its longest rule ends at 256
    assert (beyond["repeats"], beyond["agree"]) == (1, 0)


def test_ties_by_the_search_alone_count_but_are_counted_apart() -> None:
    row = repeats.judge([chose("static"), chose("static"), chose("dynamic", ties=("static",), stage="search")], 64)
    assert (row["agree"], row["agree_by_finals"]) == (3, 2)
    row = repeats.judge([chose("static"), chose("static"), chose("dynamic", ties=("static",))], 64)
    assert (row["agree"], row["agree_by_finals"]) == (3, 3)


def test_chunks_that_the_prompt_fits_are_no_other_choice() -> None:
    assert repeats.judge([chose("static"), chose("static", chunk=64)], 64)["same"] == 2
    assert repeats.judge([chose("static"), chose("static", chunk=63)], 64)["same"] == 1


def test_of_two_choices_that_are_as_frequent_the_one_with_more_agreement_counts() -> None:
    row = repeats.judge([chose("dynamic"), chose("static"), chose("quantized-8", ties=("static",))], 64)
    assert ("static cache" in row["choice"], row["agree"]) == (True, 2)


def test_the_spread_is_of_every_repeat() -> None:
    row = repeats.judge([chose("static", rate=1), chose("static", rate=2), chose("dynamic", rate=6, times=4)], 64)
    assert row["tokens_per_s"] == pytest.approx({"median": 2, "min": 1, "max": 6, "variation": 7**0.5 / 3})
    assert row["times_baseline"]["max"] == 4
    assert repeats.spread([3.0]) == {"median": 3.0, "min": 3.0, "max": 3.0}


def test_jobs_have_processors_of_their_own_a_core_s_second_thread_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 7})
    monkeypatch.setattr(repeats, "_hyperthread", lambda cpu: int(cpu in (1, 3)))
    assert repeats.places(2, 2) == [{0, 2}, {7, 1}]
    assert repeats.places(3, 2) == []


def test_repeats_run_pinned_and_their_policies_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_policy(chose("static"), tmp_path / "policy.json")
    (tmp_path / "run.py").write_text(
        "import os, shutil, sys\n"
        "folder = sys.argv[sys.argv.index('--out') + 1]\n"
        "alone = os.path.dirname(os.environ['AUTOTUNE_CACHE']) == os.path.dirname(folder)\n"
        "print(sys.argv[1:3], sorted(os.sched_getaffinity(0)), alone)\n"
        "os.mkdir(folder)\n"
        f"shutil.copy({str(tmp_path / 'policy.json')!r}, folder)\n"
    )
    monkeypatch.setattr(repeats, "COMMAND", [sys.executable, str(tmp_path / "run.py")])
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setattr(repeats, "places", lambda jobs, cores: [{cpu}] * jobs)
    options = ["--repeats", "3", "--jobs", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(repeats.main, [*options, "--", "--budget", "1GB"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for number in ("01", "02", "03"):
        told = (tmp_path / "out" / number / "output.txt").read_text()
        assert told == f"['--budget', '1GB'] [{cpu}] True\n"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["repeats"], figures["policies"], figures["holds"]) == (3, 3, True)
    assert [row["agree"] for row in figures["contexts"]] == [3, 3]

    refused = CliRunner().invoke(repeats.main, options)
    assert (refused.exit_code, "is not empty" in refused.output) == (2, True)
    for number in ("01", "02"):
        write_policy(chose("dynamic"), tmp_path / "out" / number / "run" / "policy.json")
    (tmp_path / "out" / "03" / "run" / "policy.json").unlink()
    again = CliRunner().invoke(repeats.main, ["--replay", "--out", str(tmp_path / "out")])
    assert again.exit_code == 1
    judged = json.loads(again.stdout.splitlines()[-1])
    assert (judged["repeats"], judged["policies"], judged["holds"]) == (3, 2, False)
