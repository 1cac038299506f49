"""What docs/architecture.md names is there: every module has its place, and every file and name of its lists exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "autotune"
ROOMS, _, LISTS = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Where to add")
ROWS = [line for line in LISTS.splitlines() if line.startswith("| ") and "`" in line]
ELSEWHERE = {"trials.csv", "run.json", "config.json"}  # of a run or of a model
INVENTED = {"benchmarks/NAME.py", "benchmarks/recorded/NAME-DEVICE...", "x_interval", "x_low", "x_high", "$name"}
FILE = re.compile(r"[\w./-]+\.(py|toml|json|md|html|png)|[\w./-]+/")


def read(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*.*") if file.suffix in (".py", ".toml")]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.suffix != ".png")


def test_every_module_has_its_place_among_the_rooms() -> None:
    named = set(re.findall(r"`([\w.]+?)(?:\.py)?`", ROOMS))
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and "demo" not in path.parts]
    assert len(modules) > 50
    assert [path for path in modules if path.stem not in named] == []
    rooms = set(re.findall(r"`(\w+)/`", ROOMS))
    assert {path.parent.name for path in modules} - {"autotune"} <= rooms


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_what_a_list_names_is_there(row: str) -> None:
    """A file is found from the root, beside the one named before it, or in the package, the tests or the spaces."""
    files: list[Path] = []
    words = [word for word in re.findall(r"`([^`]+)`", row) if word not in ELSEWHERE | INVENTED]
    for word in (word for word in words if FILE.fullmatch(word)):
        beside = [path if path.is_dir() else path.parent for path in files[-1:]]
        places = [ROOT, *beside, PACKAGE, ROOT / "tests", ROOT / "search_spaces"]
        found = [place / word for place in places if (place / word).exists()]
        assert found, word
        files.append(found[0])
    text = "".join(map(read, files))
    for word in (word for word in words if not FILE.fullmatch(word) and files):
        assert all(part in text for part in re.split(r"\.(?=\w)", word.rstrip("-*."))), word
