"""One whole run, repeated: how often is the answer the same, and how much does what it promises vary?

Every repeat is the command `autotune run`, with the same options and the same seed, from nothing: a run folder that
has no other beside it, and a cache of reference logits of its own. With --jobs several run side by side, each on
--cores processors that no other one uses (hyperthreads of one core last), as far as this process may use so many.

Per context the choice that most runs made is looked for in each run: as its choice; among the ties that it declares
(what its rule says is as fast within error); or the other way round, its choice among the ties that a run with the
most frequent choice declares. Two configurations that do the same at that length are the same choice. Exit code 1
where less than 9 of 10 agree in one of these ways at some context. A repeat without a policy agrees with none.
"""

from __future__ import annotations

import json
import math
import os
import queue
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

from autotune.config import Configuration
from autotune.policy.export import load_text, settings_text
from autotune.policy.policy import Policy, PolicyError, Rule, load_of, settings_of, to_configuration

COMMAND = [sys.executable, "-m", "autotune", "run"]
QUICK = "--budget 6.5GB --space quick --contexts 512,2k --timeout 150s --device cpu"
BAR = 0.9  # share of the repeats that have to agree: set by us

Answers = list[tuple[Rule, Configuration, set[Configuration]]]


def places(jobs: int, cores: int) -> list[set[int]]:
    """Processors for each job, none in two; nothing where this process may not use so many."""
    allowed = sorted(os.sched_getaffinity(0), key=lambda cpu: (_hyperthread(cpu), cpu))
    if jobs * cores > len(allowed):
        return []
    return [set(allowed[job * cores : (job + 1) * cores]) for job in range(jobs)]


def _hyperthread(cpu: int) -> int:
    """Its number among those of its core; 0 where that is not told."""
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return 0
    ends = [[int(end) for end in part.split("-")] for part in siblings.strip().split(",")]
    return sum(max(0, min(end[-1] + 1, cpu) - end[0]) for end in ends)


def repeat(folder: Path, arguments: list[str]) -> tuple[int, float]:
    """The exit code of one run into `folder`/run and the seconds that it took; what it printed is in `output.txt`."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        done = subprocess.run(
            [*COMMAND, *arguments, "--out", str(folder / "run")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "AUTOTUNE_CACHE": str(folder / "references")},
            check=False,
        )
    return done.returncode, time.monotonic() - began


def repeats(folder: Path, count: int, jobs: int, pinned: list[set[int]], arguments: list[str]) -> list[float]:
    """Run it `count` times, `jobs` at a time, into folders of `folder`; returns the seconds of each."""
    free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for cpus in pinned:
        free.put(cpus)

    def pin() -> None:  # of the calling thread alone; its processes inherit it
        if pinned:
            os.sched_setaffinity(0, free.get())

    took = {}
    with ThreadPoolExecutor(jobs, initializer=pin) as pool:
        started = {pool.submit(repeat, folder / f"{number:02}", arguments): number for number in range(1, count + 1)}
        for future in as_completed(started):
            code, took[started[future]] = future.result()
            click.echo(f"repeat {started[future]}: exit code {code} after {took[started[future]]:.0f} s", err=True)
    return [took[number] for number in sorted(took)]


def _answer(
    policy: Policy | None, context: int, finals: bool = False
) -> tuple[Rule, Configuration, set[Configuration]] | None:
    """The rule, what it chooses and what it declares to be a tie; None where the policy does not reach so far.

    With `finals`, only the ties of what was measured again.
    """
    try:
        rule = policy.rule_for(context) if policy is not None else None
    except PolicyError:
        return None
    if policy is None or rule is None:
        return None
    ties = [tie for tie in rule.ties if tie.stage == "final" or not finals]
    alike = {to_configuration(tie.load, tie.settings).at(context) for tie in ties}
    return rule, policy.configuration(rule).at(context), alike


def judge(policies: list[Policy | None], context: int) -> dict[str, Any]:
    """What the repeats' answers at a context have in common."""
    answers = [answer for policy in policies if (answer := _answer(policy, context)) is not None]
    strict = [answer for policy in policies if (answer := _answer(policy, context, finals=True)) is not None]
    counts = Counter(choice for _, choice, _ in answers)
    if not counts:
        return {"context": context, "repeats": len(policies), "same": 0, "agree": 0, "choices": {}}

    def agreement(most: Configuration, answers: Answers) -> dict[str, int]:
        named = {tie for _, choice, ties in answers if choice == most for tie in ties}
        others = [(choice, ties) for _, choice, ties in answers if choice != most]
        return {
            "same": len(answers) - len(others),
            "declare_it": sum(most in ties for _, ties in others),
            "declared_by_it": sum(choice in named for choice, _ in others),
            "agree": len(answers) - sum(most not in ties and choice not in named for choice, ties in others),
        }

    most = max(counts, key=lambda choice: (counts[choice], agreement(choice, answers)["agree"]))
    return {
        "context": context,
        "repeats": len(policies),
        "choice": _text(most),
        **agreement(most, answers),
        "agree_by_finals": agreement(most, strict)["agree"],
        "choices": {_text(choice): count for choice, count in counts.most_common()},
        "tokens_per_s": spread(rule.expected.tokens_per_s for rule, _, _ in answers),
        "times_baseline": spread(rule.speedup for rule, _, _ in answers if rule.speedup is not None),
    }


def _text(configuration: Configuration) -> str:
    return f"{load_text(load_of(configuration))}; {settings_text(settings_of(configuration))}"


def gain(policy: Policy) -> float | None:
    """Times as fast as the baseline: the geometric mean over the workload's contexts that have one."""
    asked = [rule.speedup for rule in policy.rules if rule.max_context_tokens in policy.workload["contexts"]]
    found = [speedup for speedup in asked if speedup is not None]
    return statistics.geometric_mean(found) if found else None


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, ends and coefficient of variation (standard deviation over the mean)."""
    found = list(values)
    if not found:
        return None
    variation = statistics.stdev(found) / statistics.fmean(found) if len(found) > 1 else math.nan
    ends = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return ends | ({"variation": variation} if math.isfinite(variation) else {})


def _policy(folder: Path) -> Policy | None:
    path = folder / "run" / "policy.json"
    return Policy.load(path) if path.exists() else None


def _show(row: dict[str, Any]) -> None:
    click.echo(f"\nat {row['context']} tokens: {row['agree']} of {row['repeats']} the same or a declared tie")
    for text, count in row["choices"].items():
        click.echo(f"{count:6} x {text}")
    if row["choices"]:
        click.echo(
            f"       the most frequent one is declared a tie by {row['declare_it']} others, "
            f"and declares {row['declared_by_it']} of them\n"
            f"       by finals alone {row['agree_by_finals']} are the same or a declared tie"
        )
        _show_spread("tokens/s", row["tokens_per_s"])
        _show_spread("times baseline", row["times_baseline"])


def _show_spread(name: str, found: dict[str, float] | None) -> None:
    if found is not None:
        varies = f", varies by {found['variation']:.1%}" if "variation" in found else ""
        click.echo(f"       {name}: median {found['median']:.2f}, {found['min']:.2f} to {found['max']:.2f}{varies}")


@click.command(epilog="\b\nExample:\n  python -m benchmarks.repeats --repeats 10 --jobs 5 --out repeats")
@click.option("--repeats", "count", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs side by side.")
@click.option("--cores", type=click.IntRange(min=1), default=2, show_default=True, help="Processors of each.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/repeats"), show_default=True)
@click.option("--replay", is_flag=True, help="Measure nothing: judge the repeats that --out holds.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(count: int, jobs: int, cores: int, out: Path, replay: bool, arguments: tuple[str, ...]) -> None:
    """Repeat one whole run and compare the policies; the last line is one JSON object.

    ARGUMENTS, after --, are the options of `autotune run`; without them it is the quick space on the bundled pair:
    --budget 6.5GB --space quick --contexts 512,2k --timeout 150s --device cpu.
    """
    asked = list(arguments or QUICK.split())
    pinned: list[set[int]] = []
    took: list[float] = []
    if not replay:
        if out.exists() and any(out.iterdir()):
            raise click.UsageError(f"--out {out} is not empty: give another folder, or --replay to judge what it holds")
        pinned = places(jobs, cores)
        if not pinned:
            allowed = len(os.sched_getaffinity(0))
            click.echo(f"{jobs} x {cores} processors are more than the {allowed} here: runs share them", err=True)
        took = repeats(out, count, jobs, pinned, asked)
    policies = [_policy(folder) for folder in sorted(path for path in out.iterdir() if path.is_dir())]
    made = [policy for policy in policies if policy is not None]
    if not made:
        raise click.ClickException(f"no repeat in {out} made a policy; each folder's output.txt says why")
    rows = [judge(policies, context) for context in made[0].workload["contexts"]]
    gains = spread(found for policy in made if (found := gain(policy)) is not None)
    holds = all(row["agree"] >= BAR * len(policies) for row in rows)
    for row in rows:
        _show(row)
    click.echo(f"\n{len(made)} of {len(policies)} repeats made a policy")
    _show_spread("the policy's gain, times", gains)
    if took:
        _show_spread("seconds", spread(took))
    click.echo(f"bar: {BAR:.0%} the same or a declared tie at each context: {'held' if holds else 'MISSED'}")
    figures = {
        "benchmark": "repeats",
        "arguments": asked if not replay else None,
        "jobs": jobs,
        "processors": [sorted(cpus) for cpus in pinned],
        "repeats": len(policies),
        "policies": len(made),
        "contexts": rows,
        "gain": gains,
        "seconds": spread(took),
        "holds": holds,
    }
    click.echo(json.dumps(figures))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
