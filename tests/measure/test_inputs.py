"""What may be measured on: real text of the true length, and no filler."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.demo import TARGET, held_out_text
from autotune.measure.inputs import DISTINCT, PASSAGE, UnusableText, distinct_share, prepare, prompts_of


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(held_out_text()[:60_000], encoding="utf-8")
    text, path = str(tmp_path / "text.txt"), str(tmp_path / "inputs.npz")
    return {"model": str(TARGET), "text": text, "prompts": None, "contexts": [64, 2048], "windows": 1, "path": path}


def write_prompts(folder: Path, *prompts: str) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


@pytest.mark.parametrize(
    ("period", "length", "share"), [(1000, 1000, 1.0), (10, 1007, 10 / 1000), (500, 1007, 0.5), (5, 5, 1.0)]
)
def test_the_distinct_share_of_a_repeated_pattern_is_its_period(period: int, length: int, share: float) -> None:
    assert distinct_share(np.arange(length) % period) == pytest.approx(share)
    assert PASSAGE == 8


@pytest.mark.parametrize("times", [(400,), (1,) * 400], ids=["one long line", "many short lines"])
def test_prompts_of_filler_are_refused_by_flag_and_length(
    request_: dict[str, Any], tmp_path: Path, times: tuple[int, ...]
) -> None:
    filler = write_prompts(tmp_path, *("The quick brown fox jumps over the lazy dog. " * count for count in times))
    with pytest.raises(UnusableText, match=r"^--prompts is filler: of its passages of 8 tokens at 2048 tokens only 1%"):
        prepare(**(request_ | {"prompts": filler, "contexts": [2048]}))


def test_a_text_of_filler_is_refused(request_: dict[str, Any]) -> None:
    Path(request_["text"]).write_text("x = 1\n" * 5000)
    with pytest.raises(UnusableText, match=r"^--text is filler: .* give real text of that length$"):
        prepare(**request_)


def test_real_text_and_a_prompt_that_quotes_itself_once_are_taken(request_: dict[str, Any], tmp_path: Path) -> None:
    prepare(**request_)
    rows = [prompt for context in (64, 2048) for prompt in prompts_of(request_["path"], context)]
    assert min(distinct_share(np.asarray(row)) for row in rows) > 1.5 * DISTINCT
    passage = held_out_text()[20_000:24_000]
    prepare(**(request_ | {"prompts": write_prompts(tmp_path, passage + passage, passage), "contexts": [2048]}))
