"""Answers to questions: how they are scored, what counts as a loss, and that they come through the cache in use."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from autotune.config import TASK_QUESTIONS, Configuration, LoadGroup
from autotune.demo import DRAFT, held_out_text
from autotune.engine.decode import Engine
from autotune.engine.support import full_precision
from autotune.measure.inputs import UnusableText
from autotune.measure.task import ANSWER, FEWEST, figures, prepare, score
from autotune.trial.worker import Worker

RIGHT, WRONG = (1.0, 1.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "expected", "scores"),
    [
        ("The Eiffel  Tower.", "eiffel tower", (1, 1)),
        ("Paris, France", "Paris", (0, 2 / 3)),
        ("in the city of Paris", "a city", (0, 2 / 5)),
        ("Rome", "Paris", (0, 0)),
        ("", "Paris", (0, 0)),
        ("cat cat", "cat", (0, 2 / 3)),  # a word counts as often as both have it
        ("U.S.", "us", (1, 1)),
        (" A.", "A", (1, 1)),  # a choice is not an article
        ("B", "A", (0, 0)),
        ("", "A", (0, 0)),
        ("the", "A", (0, 0)),
        ("+", "+", (1, 1)),
        ("-", "+", (0, 0)),
    ],
)
def test_an_answer_is_scored_as_squads_evaluation_does(answer: str, expected: str, scores: tuple[float, float]) -> None:
    assert score(answer, expected) == pytest.approx(scores)


def test_the_figures_are_those_of_paper_and_pencil() -> None:
    found = figures([RIGHT] * 6 + [WRONG] * 4, [RIGHT] * 10)
    assert (found["task_exact_match"], found["task_f1"]) == (0.6, 0.6)
    assert found["task_exact_match_interval"] == pytest.approx((0.3127, 0.8318), abs=1e-4)  # Wilson's
    assert found["task_loss"] == pytest.approx(0.4)
    half = 2.2622 * (0.24 / 9) ** 0.5  # Student's t with 9 degrees of freedom
    assert found["task_loss_interval"] == pytest.approx((0.4 - half, 0.4 + half), abs=1e-3)


def test_exact_match_and_f1_are_kept_apart_and_the_loss_is_of_f1() -> None:
    found = figures([(0.0, 0.75)] * 8, [(1.0, 1.0)] * 8)
    assert (found["task_exact_match"], found["task_f1"]) == (0.0, 0.75)
    assert found["task_exact_match_interval"][0] == 0
    assert 0.2 < found["task_exact_match_interval"][1] < 0.4
    assert (found["task_loss"], found["task_loss_interval"]) == (0.25, (0.25, 0.25))


def test_the_loss_is_against_the_references_own_answers_question_by_question() -> None:
    mixed = [RIGHT, WRONG] * 8
    same, other = figures(mixed, mixed), figures(mixed, mixed[::-1])
    assert (same["task_loss"], same["task_loss_interval"]) == (0, (0, 0))
    assert other["task_loss"] == 0
    assert other["task_loss_interval"][0] < -0.3
    assert figures([RIGHT] * 16, mixed)["task_loss"] == -0.5  # better than the reference is no loss


@pytest.fixture
def task(tmp_path: Path) -> Any:
    """Writes a file of questions and prepares it."""

    def write(rows: list[Any], room: int = 72) -> dict[str, Any]:
        (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = prepare(str(DRAFT), str(tmp_path / "my.jsonl"), room, str(tmp_path / "task.json"))
        return {**found, **json.loads((tmp_path / "task.json").read_text())}

    return write


def test_the_first_questions_are_asked_as_they_stand(task: Any) -> None:
    rows = [{"question": f"def f{n}(", "answer": f"x{n}"} for n in range(TASK_QUESTIONS + 5)]
    kept = task(rows)
    assert kept["task_questions"] == len(kept["questions"]) == len(kept["answers"]) == TASK_QUESTIONS
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    assert tokenizer.decode(kept["questions"][3]) == "def f3("
    assert kept["answers"][3] == "x3"
    assert kept["task_sha256"] != task(rows[1:])["task_sha256"]


def test_questions_that_are_too_few_too_long_or_none_are_refused_with_what_to_mend(task: Any) -> None:
    rows: list[dict[str, str]] = [{"question": "def main(", "answer": "argv"}] * FEWEST
    with pytest.raises(UnusableText, match=rf"--task \S+ has {FEWEST - 1} questions: give at least {FEWEST}"):
        task(rows[1:])
    long = [*rows, {"question": "x = 1\n" * 60, "answer": "1"}]
    with pytest.raises(UnusableText, match=rf"question {FEWEST + 1} has \d+ tokens.*the 72 of.*longer --contexts"):
        task(long)
    count = len(task(long, room=2000)["questions"][-1])
    assert len(task(long, room=count + ANSWER)["questions"]) == FEWEST + 1
    with pytest.raises(UnusableText, match="question 9 has"):
        task(long, room=count + ANSWER - 1)
    with pytest.raises(UnusableText, match=r"--task \S+ cannot be used \(KeyError\('answer'\)\)"):
        task([*rows, {"question": "why?"}])


@pytest.fixture(scope="module")
def worker() -> Worker:
    """A worker that holds the bundled draft."""
    worker = Worker(io.StringIO())
    word = full_precision("cpu")
    worker.engine = Engine.load(str(DRAFT), LoadGroup(weights=word, lm_head=word), "cpu")
    return worker


def questions(count: int) -> list[list[int]]:
    """Passages of 150 tokens of held-out code that end after an equals sign."""
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    lines = held_out_text()[:400_000].splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines):
        if " = " in line and number > 60 and len(found) < count and number % 7 == 0:
            text = "".join(lines[number - 60 : number]) + line.partition(" = ")[0] + " ="
            found.append(list(tokenizer(text)["input_ids"])[-150:])
    return found


def test_an_answer_is_the_first_line_of_the_greedy_continuation(worker: Worker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    stock = Configuration()
    ended = 0
    for question in questions(4):
        whole = tokenizer.decode(worker.engine.generate(question, stock, ANSWER).tokens, skip_special_tokens=True)
        assert worker._answer(tokenizer, question, stock) == whole.split("\n")[0]
        ended += "\n" in whole
    assert ended


def test_answers_go_through_the_configurations_cache_and_speculation_changes_none(worker: Worker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    asked = questions(8)
    own = [worker._answer(tokenizer, question, Configuration()) for question in asked]
    task = {"model": str(DRAFT), "questions": asked, "answers": own}
    assert worker._scores(Configuration(), task) == [RIGHT] * 8
    assert worker._scores(Configuration(cache="static", draft="prompt-lookup", depth=3), task) == [RIGHT] * 8
    assert sum(f1 for _, f1 in worker._scores(Configuration(cache="quantized-2"), task)) < 8


def test_decoding_ends_at_a_line_break(worker: Worker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    steps = []
    generate = worker.engine.generate
    worker.engine.generate = lambda *args, **more: steps.append(generate(*args, **more))
    try:
        for question in questions(8):
            worker._answer(tokenizer, question, Configuration())
    finally:
        del worker.engine.generate
    assert any("\n" in tokenizer.decode(step.tokens) for step in steps)
    assert not any("\n" in tokenizer.decode(step.tokens[:-1]) for step in steps)
    assert all(len(step.tokens) <= ANSWER for step in steps)
