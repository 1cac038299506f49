"""What may be measured on: real text of the true length, and no filler."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

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


def with_bos(folder: Path) -> Path:
    """The bundled target, whose tokenizer begins every request with a token of its own."""
    shutil.copytree(TARGET, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    single = processors.TemplateProcessing(single=f"{bos[0]} $A {bos[0]}", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = single  # after the text as well, which is no beginning
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prompts", [False, True])
def test_what_is_measured_begins_with_the_tokens_that_a_request_begins_with(
    request_: dict[str, Any], tmp_path: Path, prompts: bool
) -> None:
    given = {
        "prompts": write_prompts(tmp_path, *(held_out_text()[n:][:900] for n in (0, 5000, 9000))) if prompts else None
    }
    plain = prepare(**(request_ | given | {"contexts": [64]}))
    before = dict(np.load(request_["path"]))
    told = prepare(**(request_ | given | {"contexts": [64], "model": str(with_bos(tmp_path / "model"))}))
    after = dict(np.load(request_["path"]))
    bos = AutoTokenizer.from_pretrained(tmp_path / "model")("def")["input_ids"][0]
    assert before.keys() == after.keys()
    for name, rows in after.items():
        assert rows.shape == before[name].shape
        assert (rows[:, 0] == bos).all()
        assert (rows[:, 1:] != bos).all()
        assert (before[name] != bos).all()
    assert plain["tokens_sha256"] != told["tokens_sha256"]  # the reference's logits are others


def test_a_token_that_the_model_has_no_row_for_is_refused_by_name(request_: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    asked = request_ | {"model": str(tmp_path / "model"), "contexts": [64]}
    prepare(**asked)
    with pytest.raises(
        UnusableText, match=r"^--prompts .* has '<\|im_start\|>', token 4096 .*config.json says vocab_size = 4096"
    ):
        prepare(**(asked | {"prompts": write_prompts(tmp_path, "<|im_start|>user " + held_out_text()[:900])}))
    body = Path(request_["text"]).read_text()
    Path(request_["text"]).write_text(body[:30_000] + "<|im_start|>" + body[30_000:])
    with pytest.raises(UnusableText, match=r"^--text .* has '<\|im_start\|>', token 4096"):
        prepare(**asked)


def test_a_folder_whose_tokenizer_cannot_be_made_says_so_in_one_line(request_: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UnusableText, match=r"^no tokenizer can be made of the files in .*model: .") as error:
        prepare(**(request_ | {"model": str(tmp_path / "model")}))
    assert "\n" not in str(error.value)
