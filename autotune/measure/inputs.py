"""The real text that is measured on: prompts to continue and windows to score, at the true length, as token ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

# All chosen, not measured beside others.
PROMPTS = 2  # prompts per context
SCORED = 128  # tokens scored after each window's context
PASSAGE = 8  # tokens of the passages that filler repeats
# Least share of distinct passages; below it each is there three times or more. Planted filler has 0.04
# (benchmarks/recorded/planted-faults-h200.txt).
DISTINCT = 1 / 3


class UnusableText(ValueError):
    """The evaluation text or the prompts do not fill the longest context, or fill it with repetitions."""


def prepare(model: str, text: str, prompts: str | None, contexts: list[int], windows: int, path: str) -> dict[str, Any]:
    """Tokenize the text file and cut prompts and windows for every context, spread over the whole text.

    Writes an .npz at `path` with `prompts_N` [PROMPTS, N] and `windows_N` [windows, N + SCORED] int32. A context that
    is longer than what one prompt of the prompts file holds is filled with the prompts that follow it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    body = Path(text).read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer(body, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    asked = tokens
    if prompts is not None:
        lines = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines() if line.strip()]
        asked = np.concatenate([np.asarray(tokenizer(line)["input_ids"], dtype=np.int32) for line in lines])
    arrays: dict[str, np.ndarray] = {}
    for context in contexts:
        # prompts start half a window before the windows' starts, so that no prompt is also scored from its start
        arrays[f"windows_{context}"] = _cut(tokens, context + SCORED, windows, "--text")
        arrays[f"prompts_{context}"] = _cut(asked, context, PROMPTS, "--prompts" if prompts else "--text")
    np.savez(path, **arrays)  # type: ignore[arg-type]
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {
        "text_tokens": len(tokens),
        "windows": windows,
        "text_sha256": hashlib.sha256(body.encode()).hexdigest(),
        "tokens_sha256": digest,
    }


def _cut(tokens: np.ndarray, length: int, count: int, flag: str) -> np.ndarray:
    if len(tokens) < length:
        raise UnusableText(
            f"{flag} holds {len(tokens)} tokens and {length} are needed: give a longer file, or shorter --contexts"
        )
    starts = np.linspace(0, len(tokens) - length, count + 2)[1:-1].astype(int)
    rows = np.stack([tokens[start : start + length] for start in starts])
    share = min(distinct_share(row) for row in rows)
    if share < DISTINCT:
        raise UnusableText(
            f"{flag} is filler: of its passages of {PASSAGE} tokens at {length} tokens only {share:.0%} are distinct, "
            "so that prompt lookup and every draft would look like a win; give real text of that length"
        )
    return rows


def distinct_share(tokens: np.ndarray) -> float:
    """Distinct passages of PASSAGE tokens over all of them: near 1 for prose and code, near 0 for filler."""
    passages = np.lib.stride_tricks.sliding_window_view(tokens, min(PASSAGE, len(tokens)))
    return len(np.unique(passages, axis=0)) / len(passages)


def prompts_of(path: str, context: int) -> list[list[int]]:
    with np.load(path) as arrays:
        return arrays[f"prompts_{context}"].tolist()  # type: ignore[no-any-return]


def windows(path: str, context: int) -> tuple[list[list[int]], list[list[int]]]:
    """The contexts to prefill and the continuations to score."""
    with np.load(path) as arrays:
        rows = arrays[f"windows_{context}"].tolist()
    return [row[:context] for row in rows], [row[context:] for row in rows]
