"""That the papers beside the benchmarks name what is there, all of it, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORDED = BENCHMARKS / "recorded"
NAMES = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("__init__", "prepare", "tiny_types"))
DEVICE = re.compile(r"\b(H200|Xeon|Zen|CPU|cpu|cuda)\b")


def table(path: Path) -> dict[str, list[str]]:
    """The rows of a README's table by what its first column names; a row has as many cells as the head."""
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
    head, rule, *rest = rows
    assert set("".join(rule)) <= set("-| ")
    assert all(len(row) == len(head) for row in rest), [row for row in rest if len(row) != len(head)]
    named = {row[0].strip("`"): row[1:] for row in rest}
    assert len(named) == len(rest)
    return named


def test_every_record_has_a_line_that_tells_what_made_it_on_which_device_at_which_commit() -> None:
    named = table(RECORDED / "README.md")
    for name, (made_by, device, commit) in named.items():
        assert (RECORDED / name).exists(), name
        programs = re.findall(r"`(\w+\.py)", made_by)
        assert programs or "`autotune run" in made_by or "no benchmark" in made_by, (name, made_by)
        assert all((BENCHMARKS / program).exists() for program in programs), (name, made_by)
        assert DEVICE.search(device), (name, device)
        assert re.fullmatch(r"[0-9a-f]{7,40}", commit), (name, commit)
    for path in RECORDED.rglob("*"):
        if path.is_file() and path != RECORDED / "README.md":
            found = path.relative_to(RECORDED)
            lines = [name for name in named if found == Path(name) or Path(name) in found.parents]
            assert len(lines) == 1, (found, lines)


def test_every_benchmark_has_a_line_whose_records_are_there_and_whose_command_is_its_own() -> None:
    named = table(BENCHMARKS / "README.md")
    assert sorted(named) == [f"{name}.py" for name in NAMES]
    for name, (shows, takes, record, command) in named.items():
        assert len(shows) > 20, name
        assert takes.strip(), name
        assert command.startswith(f"`python -m benchmarks.{name.removesuffix('.py')}"), command
        for path in re.findall("`([^`]+)`", record):
            assert (RECORDED / path).exists(), (name, path)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_says_what_it_shows_and_how_it_is_run(name: str) -> None:
    if name in ("attention_speed", "int4_speed"):
        pytest.importorskip("triton")
    module = import_module(f"benchmarks.{name}")
    assert len(module.__doc__ or "") > 200
    helped = CliRunner().invoke(module.main, ["--help"], catch_exceptions=False)
    assert helped.exit_code == 0
    assert f"python -m benchmarks.{name}" in " ".join(helped.output.split())


@pytest.mark.parametrize("script", sorted((BENCHMARKS / "peers").glob("*.py")), ids=lambda path: path.stem)
def test_a_peer_s_script_says_how_it_is_run_where_the_peer_is_not_installed(script: Path) -> None:
    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert f"Example: python {script.name}" in helped.stdout
