"""That docs/models.md is not stale: ten types of as many kinds give the rows that it has, in every column.

A row of another type is only read: whether it is still so, a run of the benchmark tells.
"""

from __future__ import annotations

import os
import re
import time

import pytest
from click.testing import CliRunner

from benchmarks import model_types
from benchmarks.model_types import COLUMNS, PAGE, TYPES, Cell, Row

KINDS = ["llama", "qwen3_5_text", "gemma2", "gpt_oss", "deepseek_v3", "mamba2", "falcon_h1", "gpt2", "lfm2", "rwkv"]


def rows(page: str) -> dict[str, Row]:
    """The page's rows, each cell with its reason."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))

    def cell(text: str) -> Cell:
        status, _, number = text.rstrip(")").partition(" (")
        return Cell(status, reasons[number]) if number else Cell(status)

    found = {}
    for line in re.findall(r"^\| (`.+) \|$", page, re.MULTILINE):
        kind, *cells = line.split(" | ")
        cells = zip(COLUMNS, map(cell, cells), strict=True)
        found[kind.strip("`")] = {name: read for name, read in cells if read.status != "-"}
    return found


@pytest.fixture(scope="module")
def told() -> dict[str, Row]:
    return rows(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_every_type_once_and_the_common_ones_first(told):
    assert list(told) == TYPES


def test_the_page_is_what_the_benchmark_writes_of_its_rows(told):
    written = model_types.page(told)
    versions = re.compile(r"transformers [\d.]+\w* and torch [\d.]+\w*")
    assert versions.sub("", written) == versions.sub("", PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_gives_the_row_of_the_page(kind, told, tmp_path):
    assert model_types.check(kind, tmp_path) == told[kind]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_type_that_ends_its_process_or_takes_too_long_is_a_row(monkeypatch):
    monkeypatch.setattr(model_types, "check", lambda kind, folder: os._exit(1))
    assert model_types.checked_apart("llama", 60) == {"plan": Cell("crash", "its process ended")}
    monkeypatch.setattr(model_types, "check", lambda kind, folder: time.sleep(60))
    assert model_types.checked_apart("llama", 0.1) == {"plan": Cell("crash", "it took more than 0 s")}


@pytest.mark.parametrize("words", [["t5"], ["llama", "--write"]])
def test_a_type_that_is_not_there_and_a_page_of_a_few_types_are_refused(words):
    made = CliRunner().invoke(model_types.main, words)
    assert made.exit_code == 2
    assert made.output.splitlines()[-1].startswith("Error: ")
