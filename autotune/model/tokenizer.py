"""What a folder's tokenizer files say before a tokenizer is made of them: that they are there, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder import CONFIG, PlanError

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.json"
_FILES = ("tokenizer.*", "vocab.*", "vocab*.json", "*.model", "*.tiktoken", "tekken.json")  # any of them holds tokens
_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # those that need no file


def chat_template(folder: Path) -> str | None:
    """That of chat_template.json, where older checkpoints keep it; None where there is none."""
    path = folder / TEMPLATE
    if not path.is_file():
        return None
    template = _read(path).get("chat_template")
    if not isinstance(template, str):
        raise PlanError(f"{path}: chat_template is {type(template).__name__}, not a text; mend it or take it away")
    return template


def check_tokenizer(folder: Path) -> None:
    """Raises PlanError where no file of the folder can be a tokenizer, or its chat template cannot be read."""
    chat_template(folder)
    if any(path.is_file() for pattern in _FILES for path in folder.glob(pattern)):
        return
    config = folder / "tokenizer_config.json"
    if config.is_file() and _read(config).get("tokenizer_class") in _BYTES:
        return
    raise PlanError(f"no tokenizer in {folder} ({TOKENIZER} or another); put the files of the model's tokenizer there")


def vocabulary(folder: Path) -> Any:
    """Which token has which number; None where the folder has no tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        return _read(folder / TOKENIZER)["model"]["vocab"]
    except (KeyError, TypeError) as error:
        raise PlanError(f"{folder / TOKENIZER} cannot be read ({error}); download it again") from None


def check_texts(folder: Path, rows: int, texts: Mapping[str, str]) -> None:
    """Raises PlanError where a text, by the option that gives it, has an added token that the model has no row for."""
    if not (folder / TOKENIZER).is_file():
        return
    added = _read(folder / TOKENIZER).get("added_tokens") or []
    try:
        beyond = {str(entry["content"]): int(entry["id"]) for entry in added if entry["id"] >= rows}
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{folder / TOKENIZER}: added_tokens cannot be read ({error!r}); download it again") from None
    for option, path in texts.items() if beyond else ():
        body = Path(path).read_text(encoding="utf-8", errors="replace")
        for token, number in beyond.items():
            if token in body or json.dumps(token)[1:-1] in body:
                raise PlanError(
                    f"{option} {path} has {token!r}, token {number} in {folder / TOKENIZER}, and {folder / CONFIG} "
                    f"says vocab_size = {rows}: the model has no row for it; leave such tokens out"
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} does not hold a JSON object; download it again")
    return data
