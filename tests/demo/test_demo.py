"""The bundled pair: what it is judged by, that it loads, and that it is worth measuring."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune import demo

TARGET_BITS_PER_BYTE = 0.95
DRAFT_BITS_PER_BYTE = 1.25
ACCEPTANCE = 0.6


def test_the_held_out_text_is_the_same_every_time_and_long_enough() -> None:
    text = demo.held_out_text()
    assert text == demo.held_out_text()
    assert len(text.encode()) > 400_000


def test_the_held_out_text_names_its_documents_and_holds_only_held_out_ones() -> None:
    text = demo.held_out_text()
    held_out = [name for name, _ in demo.standard_library() if demo.is_held_out(name)]
    assert held_out == [name for name in held_out if f"### {name}\n\n" in text]
    assert "tempfile" in held_out
    assert "json.decoder" not in held_out
    assert not any(name.startswith(("test.", "idlelib", "lib2to3")) for name in held_out)


def test_about_one_document_in_twenty_is_held_out() -> None:
    names = [name for name, _ in demo.standard_library()]
    assert 0.02 < sum(map(demo.is_held_out, names)) / len(names) < 0.1


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, autotune.demo as d; d.held_out_text(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pair_is_small_enough_to_ship() -> None:
    files = [path for folder in (demo.TARGET, demo.DRAFT) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000


def test_both_models_have_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (demo.TARGET / name).read_bytes() == (demo.DRAFT / name).read_bytes()


def test_the_tokenizer_gives_every_text_back(tokenizer: Any) -> None:
    text = "def é(x):\n\treturn '日本' if x  else [0, 12345]  # … ok\r\n\n\n        pass"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_context_of_4096_tokens_and_its_answer_fit_the_models(target: Any, draft: Any) -> None:
    assert target.config.max_position_embeddings == draft.config.max_position_embeddings >= 4096 + 300
    assert target.config.vocab_size == draft.config.vocab_size == 4096


def test_the_models_know_held_out_text(target: Any, draft: Any, windows: Any, token_bytes: Any) -> None:
    import torch

    from autotune.demo.train import token_bits

    with torch.inference_mode():
        for model, floor in ((target, TARGET_BITS_PER_BYTE), (draft, DRAFT_BITS_PER_BYTE)):
            total = sum(token_bits(model, window).sum() for window in windows)
            assert total / token_bytes[windows[:, 1:]].sum() <= floor


def test_the_target_accepts_what_the_draft_proposes(target: Any, draft: Any, tokens: Any) -> None:
    import torch

    from autotune.demo.train import acceptance

    prompts = _spread(tokens, count=48, length=512)  # fewer would make the figure depend on which
    with torch.inference_mode():
        assert acceptance(target, draft, prompts, new_tokens=128, depth=4) >= ACCEPTANCE


def test_speculation_rounds_are_counted_as_verification_counts_them() -> None:
    from autotune.demo.train import accepted_and_drafted

    yes, no = True, False
    assert accepted_and_drafted([yes] * 5, depth=4) == (4, 4)
    assert accepted_and_drafted([no, yes, yes, no, yes, yes, yes, yes], depth=4) == (6, 12)
    assert accepted_and_drafted([yes, yes], depth=4) == (0, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.TARGET)


@pytest.fixture(scope="module")
def target() -> Any:
    return _model(demo.TARGET)


@pytest.fixture(scope="module")
def draft() -> Any:
    return _model(demo.DRAFT)


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Any:
    import torch

    return torch.tensor(tokenizer(demo.held_out_text())["input_ids"])


@pytest.fixture(scope="module")
def windows(tokens: Any) -> Any:
    return _spread(tokens, count=8, length=1024)


def _spread(tokens: Any, count: int, length: int) -> Any:
    """`count` windows of `length` tokens, evenly over all tokens."""
    import torch

    starts = torch.linspace(0, len(tokens) - length, count).long()
    return tokens[starts[:, None] + torch.arange(length)]


@pytest.fixture(scope="module")
def token_bytes(tokenizer: Any) -> Any:
    """The bytes of every token of the vocabulary."""
    import torch

    return torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(4096)))])
