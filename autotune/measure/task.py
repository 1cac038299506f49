"""What a configuration loses on questions with known answers: exact match and token F1 of its greedy answers.

An answer is scored as SQuAD's evaluation does (Rajpurkar et al., arXiv 1606.05250): in lower case, without punctuation
and the articles a, an and the, by whether it is the expected one, and by F1 of the words that both have.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..config import TASK_QUESTIONS
from .inputs import UnusableText

# Both chosen, not measured.
ANSWER = 32  # new tokens at most; an answer ends at a line break
FEWEST = 8  # questions, below which hardly any loss is beyond error

Score = tuple[float, float]  # exact match and F1 of one answer, 0 to 1 each


def prepare(model: str, task: str, room: int, path: str) -> dict[str, Any]:
    """Tokenize the first questions of a JSON Lines file into `path`, each as it stands, as a prompt is.

    A question with its answer may take `room` tokens, what the shortest request takes, so that answering it never holds
    more memory than what is measured. Raises UnusableText.
    """
    from transformers import AutoTokenizer

    try:
        body = Path(task).read_bytes()
        rows = [json.loads(line) for line in body.decode().splitlines() if line.strip()][:TASK_QUESTIONS]
        texts, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableText(f"--task {task} cannot be used ({error!r}): give a question and an answer a line") from None
    if len(rows) < FEWEST:
        raise UnusableText(f"--task {task} has {len(rows)} questions: give at least {FEWEST}, or no loss can be told")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    questions = [list(tokenizer(text)["input_ids"]) for text in texts]
    longest = max(range(len(questions)), key=lambda index: len(questions[index]))
    if len(questions[longest]) + ANSWER > room:
        raise UnusableText(
            f"--task {task}: question {longest + 1} has {len(questions[longest])} tokens; with {ANSWER} for its answer "
            f"that is more than the {room} of the shortest context with its new tokens: give a longer --contexts"
        )
    Path(path).write_text(json.dumps({"model": model, "questions": questions, "answers": answers}))
    return {"task_questions": len(rows), "task_sha256": hashlib.sha256(body).hexdigest()}


def score(answer: str, expected: str) -> Score:
    """Exact match and F1 of one answer. F1 is the harmonic mean of the shares of the words that the other one has."""
    ours, theirs = _words(answer), _words(expected)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return float(ours == theirs), 2 * shared / (len(ours) + len(theirs)) if shared else float(ours == theirs)


def _words(text: str) -> list[str]:
    """SQuAD's normalization; an answer that is an article (a choice of A to D) or punctuation alone keeps it."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return [word for word in bare if word not in ("a", "an", "the")] or bare or text.lower().split()


def figures(own: list[Score], reference: list[Score]) -> dict[str, Any]:
    """The record's task figures from a score per question, of the configuration and of the reference.

    `task_loss` is how far mean F1 falls below that of the unquantized reference's own answers to the same questions,
    in points (0.05 is 5 points): F1 gives credit for a part of an answer, so it tells a loss with fewer questions than
    exact match does. It is paired question by question, with a 95 % interval by Student's t; whoever judges it takes a
    loss whose interval holds 0 for none.
    """
    ours, lost = np.array(own), np.array(reference)[:, 1] - np.array(own)[:, 1]
    exact, f1 = (float(mean) for mean in ours.mean(axis=0))
    count, z = len(own), NormalDist().inv_cdf(0.975)
    freedom = count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    loss, half = float(lost.mean()), t * float(lost.std(ddof=1)) / math.sqrt(count)
    return {
        "task_exact_match": exact,
        "task_exact_match_interval": _interval(exact, count),
        "task_f1": f1,
        "task_f1_interval": _interval(f1, count),
        "task_loss": loss,
        "task_loss_interval": (loss - half, loss + half),
    }


def _interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which is too wide, never too narrow, for a mean of values from 0 to 1."""
    z = NormalDist().inv_cdf(0.975)
    middle, half = mean + z**2 / (2 * count), z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return (max(0.0, (middle - half) / (1 + z**2 / count)), min(1.0, (middle + half) / (1 + z**2 / count)))
