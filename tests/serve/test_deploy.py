from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from click.testing import CliRunner

from autotune import cli
from autotune.config import Configuration, LoadGroup, Workload
from autotune.demo import DRAFT, TARGET, held_out_text
from autotune.engine.decode import Engine, Sampling
from autotune.engine.runner import Runner
from autotune.engine.support import full_precision
from autotune.model.fingerprint import fingerprint
from autotune.policy.policy import Expected, Load, ModelInfo, Policy, PolicyError, Rule, Settings, write_policy
from autotune.serve.deploy import LLM, OutOfMemory, _Text, deploy

WORDS = full_precision("cpu")


def rule(longest: int, **settings: Any) -> Rule:
    chosen = {"draft": "none", "depth": 0, "cache": "dynamic", "prefill_chunk": 0, "launch": "eager"} | settings
    expected = Expected(
        tokens_per_s=1.0, tokens_per_s_interval=(0.1, 2.0), decode_tokens_per_s=1.0, ttft_s=1.0, peak_bytes=1
    )
    return Rule(max_context_tokens=longest, settings=Settings(**chosen), expected=expected)


def policy(folder: Path = TARGET, budget: int = 2 * 10**9) -> Policy:
    return Policy(
        model=ModelInfo(**fingerprint(folder)),
        budget_bytes=budget,
        environment={"device_word": "cpu"},
        workload=json.loads(json.dumps(dataclasses.asdict(Workload(contexts=(64, 128), new_tokens=16)))),
        load=Load(
            weights=WORDS,
            lm_head=WORDS,
            embeddings="device",
            draft=str(DRAFT),
            draft_weights=WORDS,
            attention="sdpa",
        ),
        rules=[rule(64, cache="static"), rule(128, cache="quantized-8", draft="model", depth=3)],
        baseline=[],
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    group = Configuration(weights=WORDS, lm_head=WORDS, draft=str(DRAFT), draft_weights=WORDS).load_group
    return Engine.load(str(TARGET), group, "cpu")


def test_a_deployed_policy_writes_what_the_measured_engine_writes_under_the_rule_of_the_length(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)  # this process holds the tests as well
    write_policy(policy(), tmp_path / "policy.json")
    llm = deploy(tmp_path / "policy.json")
    for prompt, limit in ((held_out_text()[:120], 64), (held_out_text()[:350], 128)):
        text = llm.generate(prompt)
        tokens = llm.tokenizer(prompt)["input_ids"]
        assert llm.last.rule.max_context_tokens == limit
        assert (len(tokens) <= 64) == (limit == 64)
        expected = engine.generate(tokens, llm.policy.configuration(llm.last.rule), 16, stop=llm._engine.stop_tokens)
        assert text == llm.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert llm.last.generation.tokens == expected.tokens
    assert llm.last.generation.proposed > 0
    assert "rule up to 128" in llm.last.summary()
    pieces = list(llm.stream(held_out_text()[:350]))
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_a_rule_with_a_load_of_its_own_is_loaded_after_the_one_before_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)
    two = policy()
    two.rules[0].load = two.load_group.model_copy(update={"draft": "none", "draft_weights": "none"})
    loads: list[str] = []
    alive: list[weakref.ref[Engine]] = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def watched(folder: str, group: LoadGroup, device: str) -> Engine:
        assert [reference() for reference in alive if reference() is not None] == []
        loads.append(group.draft)
        loaded: Engine = load(Engine, folder, group, device)
        alive.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(Engine, "load", watched)
    llm = deploy(two)
    for prompt in (held_out_text()[:350], held_out_text()[:120], held_out_text()[:100], held_out_text()[:350]):
        assert llm.generate(prompt)
        assert llm.last.generation.proposed > 0 or llm.last.rule.max_context_tokens == 64
    assert loads == [str(DRAFT), "none", str(DRAFT)]
    monkeypatch.setattr(Engine, "load", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(OutOfMemory):
        llm.generate(held_out_text()[:120])
    monkeypatch.setattr(Engine, "load", watched)
    assert llm.generate(held_out_text()[:350])


def test_lengths_that_were_not_measured_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)
    llm = deploy(policy())
    with pytest.raises(PolicyError, match="measured up to 128"):
        llm.generate(held_out_text()[:2000])
    with pytest.raises(PolicyError, match="measured with 16"):
        llm.generate("def", new_tokens=17)
    with pytest.raises(PolicyError, match="empty"):
        llm.generate("")
    assert llm.generate("def", new_tokens=1)  # a refusal leaves it usable


# ---- conversations, callers and what goes wrong


def conversing(*rules: Rule, new_tokens: int = 16, **changes: Any) -> Policy:
    """The pair in float32, so that texts can be compared token by token."""
    words = {"weights": "fp32", "lm_head": "fp32", "draft_weights": "fp32"}
    base = policy()
    return base.model_copy(
        update={
            "load_group": base.load_group.model_copy(update=words),
            "rules": list(rules),
            "workload": base.workload | {"new_tokens": new_tokens},
            **changes,
        }
    )


RULES = (
    rule(60, cache="dynamic"),
    rule(120, cache="dynamic", draft="model", depth=3),
    rule(180, cache="quantized-8", draft="prompt-lookup", depth=4, prefill_chunk=32),
    rule(1000, cache="static", draft="model", depth=4, prefill_chunk=64),
)


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)  # this process holds the tests as well
        yield deploy(conversing(*RULES))


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The model with nothing kept."""
    yield shared
    shared._engine.close()
    shared._engine._recordings.several = True


def fresh_text(llm: LLM, tokens: list[int], temperature: float = 0.0, seed: int = 0) -> list[int]:
    engine = Engine(llm._engine.target, llm._engine.draft, llm._engine.group, "cpu")
    chosen = llm.policy.configuration(llm.policy.rule_for(len(tokens)))
    sampling = Sampling(temperature, seed)
    return engine.generate(tokens, chosen, 16, sampling=sampling, stop=llm._engine.stop_tokens).tokens


def ids(llm: LLM, text: str) -> list[int]:
    return list(llm.tokenizer(text)["input_ids"])


def test_a_conversation_that_crosses_the_boundaries_replies_as_fresh_starts_do(llm: LLM) -> None:
    text = ids(llm, held_out_text())
    history: list[int] = []
    seen = []
    for begin, sampling in (
        (0, (0.0, 0)),
        (30, (0.0, 0)),
        (60, (0.8, 5)),
        (90, (0.0, 0)),
        (120, (0.8, 6)),
        (150, (0.0, 0)),
    ):
        history += text[begin : begin + 30]
        said = llm.generate(history, temperature=sampling[0], seed=sampling[1])
        reply = llm.last.generation.tokens
        assert reply == fresh_text(llm, history, *sampling)
        assert said == llm.tokenizer.decode(reply, skip_special_tokens=True)
        seen.append((llm.last.rule.max_context_tokens, llm.last.cached_tokens))
        assert llm.last.prompt_tokens == len(history)
        history += reply
    assert len(history) == 6 * 46
    # the same dynamic cache serves two rules; the others begin anew
    assert seen == [(60, 0), (120, 45), (180, 0), (180, 96), (1000, 0), (1000, 229)]
    assert "(229 of them cached)" in llm.last.summary()
    assert llm.last.acceptance is not None
    assert llm.last.tokens_per_s > 0


def test_a_history_that_was_edited_is_read_again_from_the_edit(llm: LLM) -> None:
    text = ids(llm, held_out_text())[:400]
    llm.generate(text)
    edited = [*text[:250], *text[300:]]
    llm.generate(edited)
    assert llm.last.cached_tokens == 250
    assert llm.last.generation.tokens == fresh_text(llm, edited)


def test_callers_queue_in_their_order_and_get_what_they_get_alone(llm: LLM) -> None:
    text = ids(llm, held_out_text())
    prompts = {
        name: [text[start : start + length] for length in (50, 170, 100, 300)]
        for name, start in zip("abc", (0, 500, 900), strict=True)
    }
    expected = {name: [fresh_text(llm, prompt) for prompt in own] for name, own in prompts.items()}
    got: dict[str, list[list[int]]] = {name: [] for name in prompts}

    def ask(name: str) -> None:
        for prompt in prompts[name]:
            stream = llm.stream(prompt)
            said = "".join(stream)
            assert stream.request is not None
            got[name].append(stream.request.generation.tokens)
            assert said == llm.tokenizer.decode(got[name][-1], skip_special_tokens=True)

    with ThreadPoolExecutor(3) as callers:
        for done in [callers.submit(ask, name) for name in prompts]:
            done.result()
    assert got == expected
    order: list[int] = []
    generate = llm._engine.generate

    def noting(tokens: list[int], *rest: Any, **options: Any) -> Any:
        order.append(len(tokens))
        return generate(tokens, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._engine, "generate", noting)
        streams = [llm.stream(text[:length]) for length in (40, 20, 30, 10)]
        for stream in reversed(streams):
            assert "".join(stream)
    assert order == [40, 20, 30, 10]


class Gate:
    """Decode steps wait until they are let through, one at a time."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.steps, self.through, self.reached = 0, threading.Semaphore(0), threading.Event()
        feed = Runner.feed

        def waiting(runner: Runner, *rest: Any) -> torch.Tensor:
            self.reached.set()
            self.through.acquire(timeout=60)
            self.steps += 1
            return feed(runner, *rest)

        patch.setattr(Runner, "feed", waiting)

    def open(self, steps: int = 10**4) -> None:
        self.through.release(steps)


def test_a_closed_stream_ends_within_a_step_and_the_next_is_served(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(llm, held_out_text())
    gate = Gate(monkeypatch)
    stream = llm.stream(text[:50])
    piece = next(stream)
    assert stream.request is None
    assert gate.reached.wait(60)
    waiting = llm.stream(text[:40])
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(waiting))
    reader.start()
    waiting.close()  # has not begun: nothing to wait for
    reader.join(60)
    assert not reader.is_alive()
    assert read == []
    assert waiting.request is not None
    assert (waiting.request.finish_reason, waiting.request.generation.tokens) == ("closed", [])
    assert waiting.request.tokens_per_s == 0
    assert list(waiting) == []
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._text.closed:
        time.sleep(0.001)
    gate.open(1)
    closing.join(60)
    assert not closing.is_alive()
    assert gate.steps == 1
    assert stream.request is not None
    assert stream.request.finish_reason == "closed"
    assert len(stream.request.generation.tokens) == 2
    assert list(stream) == []
    gate.open()
    whole = llm.generate(text[:50])
    assert whole.startswith(piece)
    assert llm.last.generation.tokens == fresh_text(llm, text[:50])
    assert llm.last.cached_tokens == 49  # an ended request can be gone on from
    assert llm.last.finish_reason == "length"


def test_a_stream_that_is_forgotten_frees_its_place(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(llm, held_out_text())
    gate = Gate(monkeypatch)
    for piece in llm.stream(text[:50]):
        assert piece
        assert gate.reached.wait(60)
        break
    gate.open()
    assert llm.generate(text[:30])
    assert gate.steps <= 1 + len(llm.last.generation.step_s)  # one of the 15 that it would have taken
    assert llm.last.generation.tokens == fresh_text(llm, text[:30])


def pieces_of(llm: LLM, tokens: list[int], stop: list[str], size: int) -> tuple[list[str], bool]:
    """What is shown when `tokens` come `size` at a time, and whether it was stopped."""
    text = _Text(llm.tokenizer, stop)
    for begin in range(0, len(tokens), size):
        if not text.ended():
            text.add(tokens[begin : begin + size])
    text.add([], last=True)
    return [text.pieces.get() or "" for _ in range(text.pieces.qsize())], text.stopped


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_ends_before_the_first_stop_string_wherever_its_pieces_break(llm: LLM, size: int) -> None:
    tokens = ids(llm, held_out_text()[:300])[:30]
    whole = llm.tokenizer.decode(tokens)
    assert pieces_of(llm, tokens, [], 1)[0] == [llm.tokenizer.decode([token]) for token in tokens]
    for begin, length in itertools.product(range(len(whole)), (1, 2, 5, 9)):
        word = whole[begin : begin + length]
        pieces, stopped = pieces_of(llm, tokens, ["\x00never", word, whole[0] + "\x00"], size)
        assert ("".join(pieces), stopped) == (whole[: whole.find(word)], True)
        assert all(pieces)
    # what was held back comes at the end
    assert "".join(pieces_of(llm, tokens, [whole[-9:] + "x", "\x00"], size)[0]) == whole
    # the first to be complete, and of those the longest
    assert "".join(pieces_of(llm, tokens, [whole[3:9], whole[5:9], whole[4:12]], size)[0]) == whole[:3]


def test_decoding_ends_at_a_stop_string(llm: LLM) -> None:
    prompt = ids(llm, held_out_text())[:55]
    whole = llm.generate(prompt)
    assert llm.last.finish_reason == "length"
    tokens = llm.last.generation.tokens
    middle = llm.tokenizer.decode(tokens[:8])
    word = whole[len(middle) - 2 : len(middle) + 2]
    stream = llm.stream(prompt, stop=[word])
    assert "".join(stream) == whole[: whole.find(word)]
    assert stream.request is not None
    assert stream.request.finish_reason == "stop"
    assert len(stream.request.generation.tokens) <= 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "stop_tokens", {tokens[3]})
        llm.generate(prompt)
    assert llm.last.finish_reason == "stop"
    assert llm.last.generation.tokens == tokens[: tokens.index(tokens[3]) + 1]


def test_a_character_is_shown_whole_or_at_the_end(llm: LLM) -> None:
    tokens = ids(llm, "a 日本語 é — naïve 🙂")
    assert len(tokens) > len("a 日本語 é — naïve 🙂")  # characters of several tokens
    for end in range(1, len(tokens) + 1):
        pieces, _ = pieces_of(llm, tokens[:end], ["\x00"], 1)
        assert "".join(pieces) == llm.tokenizer.decode(tokens[:end])
        assert not any("\ufffd" in piece for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": [1] * 1001}, "measured up to 1000"),
        ({"prompt": []}, "empty"),
        ({"prompt": [1, 10**6]}, "vocabulary"),
        ({"prompt": [1, -1]}, "vocabulary"),
        ({"prompt": [1], "new_tokens": 17}, "measured with 16"),
        ({"prompt": [1], "new_tokens": 0}, "0 new tokens"),
        ({"prompt": [1], "temperature": -1.0}, "temperature"),
        ({"prompt": [1], "temperature": float("nan")}, "temperature"),
        ({"prompt": [1], "stop": [""]}, "stop"),
        ({"prompt": [1], "stop": "x"}, "stop"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_it_is_read(
    llm: LLM, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        llm.stream(**asked)


def test_an_error_reaches_its_own_caller_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(llm, held_out_text())
    forward = Runner._forward

    def failing(runner: Runner, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        if len(tokens) == 33:
            raise RuntimeError("planted")
        return forward(runner, tokens, keep)

    monkeypatch.setattr(Runner, "_forward", failing)
    broken, sound = llm.stream(text[:33]), llm.stream(text[:40])
    with pytest.raises(RuntimeError, match="planted"):
        list(broken)
    assert broken.request is None
    assert list(broken) == []
    assert "".join(sound)
    assert sound.request is not None
    assert sound.request.generation.tokens == fresh_text(llm, text[:40])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. GPU 0 has"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize("failing_at", [0, 5])
def test_a_request_is_tried_again_when_memory_runs_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception, failing_at: int
) -> None:
    text = ids(llm, held_out_text())
    llm.generate(text[:100])
    forward, left = Runner._forward, [failing_at]
    target = llm._engine.target

    def failing(runner: Runner, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        if runner.model is target and left:
            left[0] -= 1
            if left[0] < 0:
                left.pop()
                raise error
        return forward(runner, tokens, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_forward", failing)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        said = "".join(llm.stream(text[:110]))
    assert not left
    assert llm.last.generation.tokens == fresh_text(llm, text[:110])
    assert said == llm.tokenizer.decode(llm.last.generation.tokens, skip_special_tokens=True)  # nothing came twice
    assert llm.last.cached_tokens == 0
    monkeypatch.setattr(Runner, "_forward", Mock(side_effect=error))
    with pytest.raises(OutOfMemory, match="a prompt of 110 tokens did not fit the budget of 1,907 MiB: "):
        llm.generate(text[:110])
    monkeypatch.undo()
    assert llm.generate(text[:110]) == said
    llm.generate(text[:150])
    assert {key[0] for _, key in llm._engine._recordings.kept} == {"quantized-8"}  # one cache from now on


OUT_OF_MEMORY = """
import sys
from autotune.serve.deploy import OutOfMemory, deploy
llm = deploy(sys.argv[1])
small = llm.generate([5, 6, 7] * 10, new_tokens=8)
first = llm.last
large = llm.generate([5, 6, 7] * 100, new_tokens=8)  # a cache of the rule's length does not fit, its own does
assert llm.last.rule.max_context_tokens > 10**6
try:
    llm.generate([5, 6, 7] * 100)  # nothing fits
except OutOfMemory as error:
    print(error)
assert llm.generate([5, 6, 7] * 10, new_tokens=8) == small
assert llm.generate([5, 6, 7] * 100, new_tokens=8) == large
assert llm.last.peak_bytes <= llm.policy.budget_bytes
print(first.summary())
"""


def test_a_process_under_its_cap_outlives_running_out_of_memory(tmp_path: Path) -> None:
    longest = 3 * 10**6
    chosen = conversing(
        rule(64, cache="dynamic"), rule(longest, cache="static"), new_tokens=longest, budget_bytes=10**9
    )
    write_policy(chosen, tmp_path / "policy.json")
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "policy.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "a prompt of 300 tokens did not fit the budget of 954 MiB: " in done.stdout
    assert "30 tokens in, 8 out" in done.stdout


def test_a_policy_of_another_place_is_refused_with_what_to_mend(tmp_path: Path) -> None:
    moved = policy().model_copy(update={"model": ModelInfo(path="/no/such", weights_sha256="", tokenizer_sha256="")})
    with pytest.raises(PolicyError, match=r"edit model\.path"):
        deploy(moved)
    if not torch.cuda.is_available():
        with pytest.raises(PolicyError, match="no GPU"):
            deploy(policy(), device="cuda:0")


def test_generate_keeps_the_budget_and_prints_the_text(tmp_path: Path) -> None:
    write_policy(policy(), tmp_path / "policy.json")
    command = [sys.executable, "-m", "autotune", "generate", str(tmp_path / "policy.json"), "--prompt", "-"]
    done = subprocess.run(command, input="def main():", capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr
    small = policy(budget=100 * 10**6)  # less than the libraries alone hold
    write_policy(small, tmp_path / "policy.json")
    done = subprocess.run(command, input="def main():", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "the budget is" in done.stderr


def test_plan_predicts_without_torch_and_says_what_fits() -> None:
    code = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    code += "from autotune.cli import main\nmain()"
    command = [sys.executable, "-c", code, "plan", "--budget", "560MB", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = json.loads(done.stdout)
    assert done.stderr.strip().endswith("False")
    totals = [row["contexts"]["4096"]["total_bytes"] for row in rows]
    assert totals == sorted(totals)
    for row in rows:
        for context in row["contexts"].values():
            assert context["total_bytes"] == sum(context["owners"].values())
        fits = row["largest_context_tokens"]
        assert (fits >= 4096) == (row["contexts"]["4096"]["total_bytes"] <= 560 * 10**6)
    layers = CliRunner().invoke(cli.main, ["plan", "--budget", "1GB", "--device", "cpu", "--by-layer", "--json"])
    assert len(json.loads(layers.stdout)) >= 8


def test_deploy_is_the_function_however_it_was_imported(tmp_path: Path) -> None:
    import autotune
    import autotune.serve.deploy

    with pytest.raises(PolicyError, match="cannot be read"):
        autotune.deploy(tmp_path / "policy.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_that_changed_since_it_was_measured_is_not_deployed(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(TARGET, tmp_path / "model")
    measured = policy(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(PolicyError, match=f"{name} has changed since the policy was measured"):
        deploy(measured)
    (folder / name).unlink()
    with pytest.raises(PolicyError, match=f"{name} is missing"):
        deploy(measured)


TEMPLATE = "ours: {{ messages[0].content }}"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": TEMPLATE}]}),
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", {"chat_template": TEMPLATE}),
    ],
)
def test_a_chat_template_is_found_wherever_a_checkpoint_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: Any
) -> None:
    model = shutil.copytree(TARGET, tmp_path / "model")
    if isinstance(content, dict):
        path = model / file
        before = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps(before | content)
    (model / file).write_text(content)
    monkeypatch.setattr(Engine, "load", MagicMock())  # no weight has a part in it
    llm = LLM(policy(model), "cpu")
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert prompt == "ours: hello"
    assert file in fingerprint(model)["files"]
