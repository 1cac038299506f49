"""The server, asked by the openai package and by curl: answers, refusals, the queue, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from autotune.cli import main
from autotune.demo import TARGET, held_out_text
from autotune.policy.policy import Policy, PolicyError, write_policy
from autotune.serve.openai_api import (
    APIError,
    ChatRequest,
    CompletionRequest,
    Message,
    conversation_tokens,
    parse,
)
from autotune.serve.server import _body, application, bind, is_loopback, model_name
from tests.policies import bundled_policy

TOKENIZER = AutoTokenizer.from_pretrained(TARGET)
CHATML = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# A model that is none: it writes "number 0 number 1 …" for a prompt, and waits when it is told to ---------------------


@dataclass
class FakeStream:
    """Writes the words of its text, one a step, as `deploy`'s streams do."""

    llm: FakeLLM
    tokens: list[int]
    words: list[str]
    finish: str
    closed: bool = False
    written: int = 0

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> str:
        if self.closed or self.written == len(self.words):
            if not self.closed:
                self._end(self.finish)
            raise StopIteration
        self.llm.running.append(self)
        for _ in range(1000):
            if self.llm.go.wait(0.02):
                break
            if self.closed:  # by another thread
                raise StopIteration
        else:
            raise AssertionError("the test never let it go on")
        if self.llm.fails_at == self.written:
            raise self.llm.failure
        self.written += 1
        return self.words[self.written - 1]

    def close(self) -> None:
        if not self.closed and self.written < len(self.words):
            self._end("closed")
        self.closed = True

    def _end(self, finish: str) -> None:
        text = "".join(self.words[: self.written])
        same = [a == b for a, b in zip(self.llm.held, self.tokens, strict=False)]
        shared = (*same, False).index(False)
        self.llm.held = self.tokens + TOKENIZER(text)["input_ids"]
        generation = SimpleNamespace(tokens=[0] * self.written, ttft_s=0.5, decode_s=1.5, proposed=4, accepted=3)
        self.request = SimpleNamespace(
            rule=self.llm.policy.rule_for(len(self.tokens)),
            prompt_tokens=len(self.tokens),
            cached_tokens=shared,
            finish_reason=finish,
            generation=generation,
            peak_bytes=10**6 * len(self.tokens),
            summary=lambda: f"{len(self.tokens)} tokens in",
        )
        self.llm.ended.append(finish)


@dataclass
class FakeLLM:
    policy: Policy = field(default_factory=bundled_policy)
    tokenizer: Any = TOKENIZER
    go: threading.Event = field(default_factory=threading.Event)
    fails_at: int | None = None
    failure: Exception = field(default_factory=lambda: RuntimeError("the device is lost"))
    calls: list[SimpleNamespace] = field(default_factory=list)
    running: list[FakeStream] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def stream(self, prompt: list[int], **options: Any) -> FakeStream:
        asked = options["new_tokens"] or 4
        self.calls.append(SimpleNamespace(text=TOKENIZER.decode(prompt), tokens=prompt, **options))
        last = TOKENIZER.decode(prompt).split()[-1]
        words, finish = [f"{last} {number}, " for number in range(asked)], "length"
        for stop in options["stop"]:
            for number in range(asked):
                text = "".join(words[: number + 1])
                if stop in text:
                    words, finish = [text[: text.index(stop)]], "stop"
                    break
        return FakeStream(self, prompt, words, finish)


@contextmanager
def served(llm: Any, **options: Any) -> Iterator[str]:
    """The address of a running server."""
    bound = bind("127.0.0.1", 0)
    app = application(llm, **({"name": "target", "api_key": None, "max_queue": 16, "max_body": 10**5} | options))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
    assert not thread.is_alive()


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.fixture
def llm() -> FakeLLM:
    fake = FakeLLM()
    fake.go.set()
    return fake


@pytest.fixture
def url(llm: FakeLLM) -> Iterator[str]:
    with served(llm) as address:
        yield address


def openai_at(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_at(url) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def curl(*words: str, body: str | None = None) -> tuple[int, str]:
    """The status and the body."""
    command = ["curl", "--silent", "--no-buffer", "--max-time", "20", "--write-out", "\n%{http_code}", *words]
    command += ["--json", "@-"] if body is not None else []
    answer, _, status = subprocess.run(
        command, input=body, capture_output=True, text=True, check=True
    ).stdout.rpartition("\n")
    return int(status), answer


def metrics(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(curl(f"{url}/metrics")[1])
    return {s.labels.get("outcome", s.name): s.value for family in families for s in family.samples}


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_with_what_the_engine_writes(client: openai.OpenAI, llm: FakeLLM) -> None:
    reply = client.chat.completions.create(model="target", messages=user("say hello"), max_completion_tokens=3)
    assert reply.object == "chat.completion"
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == (
        "assistant",
        "hello 0, hello 1, hello 2, ",
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.model == "target"
    assert reply.usage.prompt_tokens == len(TOKENIZER("say hello")["input_ids"])
    assert reply.usage.completion_tokens == 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 3
    assert llm.calls[0].text == "say hello"
    assert llm.calls[0].new_tokens == 3


def test_a_completion_takes_text_or_tokens(client: openai.OpenAI, llm: FakeLLM) -> None:
    tokens = TOKENIZER("def main")["input_ids"]
    prompts: list[Any] = ["def main", ["def main"], tokens, [tokens]]
    for prompt in prompts:
        reply = client.completions.create(model="target", prompt=prompt, max_tokens=2)
        assert reply.object == "text_completion"
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("main 0, main 1, ", "length")
    assert all(call.tokens == tokens for call in llm.calls)


@pytest.mark.parametrize("usage", [True, False])
def test_what_is_streamed_is_what_is_answered_whole(client: openai.OpenAI, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(model="target", messages=user("say hello"), stream=True, **options))
    whole = client.chat.completions.create(model="target", messages=user("say hello"))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert len(choices) > 3
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        assert chunks[-1].usage.completion_tokens == 4
    else:
        assert chunks[-1].usage is None

    pieces = list(client.completions.create(model="target", prompt="hello", stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == "hello 0, hello 1, hello 2, hello 3, "
    assert pieces[-1].choices[0].finish_reason == "length"


def test_pieces_come_as_they_are_written(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.go.clear()
    with ThreadPoolExecutor() as pool:
        opening = pool.submit(client.completions.create, model="target", prompt="hello", stream=True)
        until(lambda: llm.running)
        llm.fails_at = 1
        llm.go.set()
        stream = opening.result()
        assert next(stream).choices[0].text == "hello 0, "
    with pytest.raises(openai.APIError, match="the server failed"):  # long after the status was sent
        list(stream)
    llm.fails_at = None
    assert client.completions.create(model="target", prompt="hello").choices[0].text.startswith("hello 0")


def test_stop_temperature_and_seed_reach_the_engine(client: openai.OpenAI, llm: FakeLLM) -> None:
    reply = client.chat.completions.create(
        model="target", messages=user("hello"), stop=" 2", temperature=0, seed=7, max_tokens=9
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == "hello 0, hello 1, hello"
    assert (llm.calls[0].stop, llm.calls[0].temperature, llm.calls[0].seed, llm.calls[0].new_tokens) == (
        [" 2"],
        0,
        7,
        9,
    )
    for _ in range(2):
        client.completions.create(model="target", prompt="hello", stop=["x", "y"])
    assert llm.calls[1].stop == ["x", "y"]
    assert llm.calls[1].temperature == 1.0  # the API's default
    assert llm.calls[1].seed != llm.calls[2].seed
    assert llm.calls[1].new_tokens is None


def test_the_second_turn_of_a_conversation_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "You write Python."}, *user("def first():")]
    first = client.chat.completions.create(model="target", messages=messages)
    messages += [{**first.choices[0].message.model_dump()}, *user("def second():")]
    second = client.chat.completions.create(model="target", messages=messages)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_callers_at_the_same_time_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(word: str) -> str:
        stream = client.completions.create(model="target", prompt=f"say {word}", stream=True, max_tokens=16)
        return "".join(chunk.choices[0].text for chunk in stream)

    words = [f"word{number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, words))
    assert answers == ["".join(f"{word} {number}, " for number in range(16)) for word in words]


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="target",
        messages=[{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "hello"}]}],
        n=1,
        top_p=1,
        user="me",
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
    )
    assert reply.choices[0].message.content.startswith("hello 0")


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["target"]
    assert client.models.retrieve("target").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# Refusals -------------------------------------------------------------------------------------------------------------

HELLO: dict[str, Any] = {"model": "target", "prompt": "hello"}
CHAT: dict[str, Any] = {"model": "target", "messages": user("hello")}


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (HELLO | {"n": 2}, 400, "n", "unsupported_parameter"),
        (HELLO | {"top_p": 0.9}, 400, "top_p", "unsupported_parameter"),
        (HELLO | {"logprobs": 0}, 400, "logprobs", "unsupported_parameter"),
        (HELLO | {"echo": True}, 400, "echo", "unsupported_parameter"),
        (HELLO | {"best_of": 3}, 400, "best_of", "unsupported_parameter"),
        (HELLO | {"suffix": "end"}, 400, "suffix", "unsupported_parameter"),
        (HELLO | {"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
        (HELLO | {"frequency_penalty": -1}, 400, "frequency_penalty", "unsupported_parameter"),
        (HELLO | {"logit_bias": {"50256": -100}}, 400, "logit_bias", "unsupported_parameter"),
        (HELLO | {"top_k": 5}, 400, "top_k", "unsupported_parameter"),
        (CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        (CHAT | {"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
        (CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        (CHAT | {"messages": [{**CHAT["messages"][0], "name": "me"}]}, 400, "messages.0.name", "unsupported_parameter"),
        (CHAT | {"messages": []}, 400, "messages", None),
        (CHAT | {"messages": [{"role": "tool", "content": "4"}]}, 400, "messages", None),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", None),
        (CHAT | {"messages": user("")}, 400, "messages", None),
        (HELLO | {"prompt": ""}, 400, "prompt", None),
        (HELLO | {"prompt": []}, 400, "prompt", None),
        (HELLO | {"prompt": ["a", "b"]}, 400, "prompt", None),
        (HELLO | {"prompt": [10**6]}, 400, "prompt", None),
        (HELLO | {"prompt": [-1]}, 400, "prompt", None),
        (HELLO | {"temperature": 2.5}, 400, "temperature", None),
        (HELLO | {"temperature": "hot"}, 400, "temperature", None),
        (HELLO | {"max_tokens": 0}, 400, "max_tokens", None),
        (HELLO | {"max_tokens": 17}, 400, "max_tokens", None),
        (CHAT | {"max_completion_tokens": 17}, 400, "max_completion_tokens", None),
        (HELLO | {"seed": 2**64}, 400, "seed", None),
        (HELLO | {"stop": ""}, 400, "stop", None),
        (HELLO | {"stop": list("abcde")}, 400, "stop", None),
        (HELLO | {"prompt": "x = 1\n" * 300}, 400, "prompt", "context_length_exceeded"),
        (CHAT | {"messages": user("x = 1\n" * 300)}, 400, "messages", "context_length_exceeded"),
        (HELLO | {"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"prompt": "hello"}, 400, "model", None),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    url: str, llm: FakeLLM, body: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    path = "chat/completions" if "messages" in body else "completions"
    got, text = curl(f"{url}/v1/{path}", "--json", json.dumps(body))
    error = json.loads(text)["error"]
    assert (got, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert llm.calls == []
    assert metrics(url)["refused"] == 1


def test_the_openai_package_sees_the_error_and_its_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="measured up to 256") as caught:
        client.completions.create(model="target", prompt="x = 1\n" * 300)
    assert caught.value.code == "context_length_exceeded"


def test_what_is_no_request_is_refused_in_the_same_form(url: str) -> None:
    chunked = ("--header", "Transfer-Encoding: chunked")
    for body, words, status in (
        ("{", (), 400),
        ("[1]", (), 400),
        ('{"model": "target", "prompt": "\\ud800"}', (), 400),
        (None, (), 405),
        (json.dumps({**HELLO, "prompt": "x" * 10**5}), (), 413),
        (json.dumps({**HELLO, "prompt": "x" * 10**6}), chunked, 413),
        (json.dumps({**HELLO, "prompt": "x" * 10**7}), (), 413),
        (json.dumps(HELLO), chunked, 200),
    ):
        got, text = curl(f"{url}/v1/completions", *words, body=body)
        assert got == status, text
        assert ("error" in json.loads(text)) == (status != 200)
    got, text = curl(f"{url}/v1/embeddings", "--json", "{}")
    assert got == 404
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_an_end_is_not_read_to_its_end() -> None:
    read: list[bytes] = []

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(10**4):
            read.append(b"x" * 1000)
            yield read[-1]

    with pytest.raises(APIError, match="--max-body"):
        asyncio.run(_body(SimpleNamespace(stream=stream), 10**4))  # type: ignore[arg-type]
    assert len(read) < 200


def test_a_failure_of_the_engine_is_a_500_and_the_next_request_is_answered(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.fails_at = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            client.completions.create(model="target", prompt="hello", stream=stream)
    llm.fails_at = None
    assert client.completions.create(model="target", prompt="hello").choices[0].text.startswith("hello 0")


def test_what_does_not_fit_the_budget_is_a_503_with_its_reason(client: openai.OpenAI, llm: FakeLLM, url: str) -> None:
    llm.fails_at, llm.failure = 0, PolicyError("a prompt of 1 tokens did not fit the budget")
    with pytest.raises(openai.InternalServerError, match="did not fit the budget") as caught:
        client.completions.create(model="target", prompt="hello")
    assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
    llm.fails_at = 1
    with pytest.raises(openai.APIError, match="did not fit the budget"):
        list(client.completions.create(model="target", prompt="hello", stream=True))
    until(lambda: metrics(url)["failed"] == 2)


def test_only_the_right_key_opens(llm: FakeLLM) -> None:
    with served(llm, api_key="s3cret") as url:
        with openai_at(url, "s3cret") as client:
            assert client.completions.create(model="target", prompt="hello").choices
        with openai_at(url, "s3cre") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        for path in ("v1/completions", "v1/chat/completions"):
            assert curl(f"{url}/{path}", "--json", "{}")[0] == 401
        for path in ("v1/models", "v1/models/target", "metrics"):
            assert curl(f"{url}/{path}")[0] == 401
        assert curl(f"{url}/health")[0] == 200


# The queue ------------------------------------------------------------------------------------------------------------


def leaves(url: str, body: dict[str, Any]) -> socket.socket:
    """A client that asks and then does not read: closing the socket is going away."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    text = json.dumps(body).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(url: str, llm: FakeLLM, client: openai.OpenAI, stream: bool) -> None:
    llm.go.clear()
    sock = leaves(url, HELLO | {"stream": stream, "max_tokens": 16})
    until(lambda: llm.running)
    sock.close()
    until(lambda: llm.ended)  # without another piece: it may be at the prompt
    assert llm.ended == ["closed"]
    assert llm.running[0].written == 0
    llm.go.set()
    assert client.completions.create(model="target", prompt="hello").choices
    assert metrics(url)["abandoned"] == 1


def test_a_client_that_goes_away_while_it_is_streamed_to_ends_the_decoding(
    url: str, llm: FakeLLM, client: openai.OpenAI
) -> None:
    steps = threading.Semaphore(1)
    llm.go = SimpleNamespace(wait=lambda seconds: steps.acquire(timeout=seconds))  # type: ignore[assignment]
    stream = client.completions.create(model="target", prompt="hello", stream=True, max_tokens=16)
    assert next(stream).choices[0].text == "hello 0, "
    stream.close()
    until(lambda: llm.ended)
    assert llm.ended == ["closed"]
    assert llm.running[0].written == 1


def test_a_client_that_goes_away_in_the_queue_never_runs(url: str, llm: FakeLLM, client: openai.OpenAI) -> None:
    llm.go.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.completions.create, model="target", prompt="first")
        until(lambda: llm.running)
        waiting = leaves(url, HELLO)
        until(lambda: metrics(url)["autotune_queue_length"] == 1)
        waiting.close()
        until(lambda: metrics(url)["autotune_queue_length"] == 0)
        llm.go.set()
        assert first.result().choices[0].text.startswith("first 0")
    assert {stream.words[0] for stream in llm.running} == {"first 0, "}
    assert metrics(url)["abandoned"] == 1


def test_more_than_may_wait_are_refused(llm: FakeLLM) -> None:
    llm.go.clear()
    with served(llm, max_queue=1) as url, openai_at(url) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.completions.create, model="target", prompt="first")
        until(lambda: llm.running)
        second = pool.submit(client.completions.create, model="target", prompt="second")
        until(lambda: metrics(url)["autotune_queue_length"] == 1)
        with pytest.raises(openai.RateLimitError, match="--max-queue") as caught:
            client.completions.create(model="target", prompt="third")
        assert caught.value.code == "queue_full"
        llm.go.set()
        assert first.result().choices[0].text.startswith("first")
        assert second.result().choices[0].text.startswith("second")
        assert metrics(url)["busy"] == 1
        assert client.completions.create(model="target", prompt="third").choices[0].text.startswith("third")


def test_prometheus_reads_the_counts(url: str, client: openai.OpenAI, llm: FakeLLM) -> None:
    for prompt in ("hello", "hello there"):
        client.completions.create(model="target", prompt=prompt)
    tokens = [len(TOKENIZER(prompt)["input_ids"]) for prompt in ("hello", "hello there")]
    seen = metrics(url)
    assert {outcome: seen[outcome] for outcome in ("ok", "refused", "busy", "abandoned", "failed")} == {
        "ok": 2, "refused": 0, "busy": 0, "abandoned": 0, "failed": 0,
    }  # fmt: skip
    assert seen["autotune_prompt_tokens_total"] == sum(tokens)
    assert seen["autotune_cached_tokens_total"] == tokens[0]
    assert seen["autotune_generated_tokens_total"] == 8
    assert seen["autotune_ttft_seconds_total"] == 1
    assert seen["autotune_decode_seconds_total"] == 3
    assert seen["autotune_accepted_tokens_total"] == 6
    assert seen["autotune_proposed_tokens_total"] == 8
    assert seen["autotune_tokens_per_s"] == 2
    assert seen["autotune_peak_bytes"] == 10**6 * max(tokens)
    assert seen["autotune_budget_bytes"] == 2 * 10**9
    llm.fails_at = 0
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="target", prompt="hello")
    assert metrics(url)["failed"] == 1


# A conversation's tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_turn_begins_with_the_tokens_of_the_turn_before(template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = template
    messages = [Message(role="developer", content="Write Python.")]
    before: list[int] = []
    for number in range(5):
        messages.append(Message(role="user", content=f"def f{number}(x):\n"))
        tokens = conversation_tokens(tokenizer, messages)
        assert tokens[: len(before)] == before
        assert len(tokens) > len(before)
        before = tokens
        messages.append(Message(role="assistant", content="    return x\n\n\n"))  # would melt with the line break
    text = tokenizer.decode(before)
    if template:
        assert text.startswith("<|im_start|>system\nWrite Python.<|im_end|>\n<|im_start|>user\ndef f0(x):")
        assert text.endswith("<|im_start|>assistant\n")
    else:
        turn = "def f{}(x):\n    return x\n\n\n"
        assert text == "Write Python.\n" + "\n".join(turn.format(number) for number in range(4)) + "\ndef f4(x):\n"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole != before  # or this test's texts would not need the cuts


NEEDS_A_USER = (
    "{% if not (messages | selectattr('role', 'equalto', 'user') | list) %}"
    "{{ raise_exception('nobody asks') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def test_a_conversation_that_begins_with_a_greeting_is_taken_where_its_template_takes_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = NEEDS_A_USER
    messages = [Message(role="system", content="Be brief."), Message(role="assistant", content="Hello!")]
    with pytest.raises(APIError, match="nobody asks"):
        conversation_tokens(tokenizer, messages)
    messages.append(Message(role="user", content="def f(x):"))
    before = conversation_tokens(tokenizer, messages)
    assert tokenizer.decode(before) == "system: Be brief.\nassistant: Hello!\nuser: def f(x):\n"
    messages += [Message(role="assistant", content="    return x\n\n\n"), Message(role="user", content="more")]
    assert conversation_tokens(tokenizer, messages)[: len(before)] == before


def test_named_templates_without_a_default_are_a_400_and_no_crash() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = {"rag": NEEDS_A_USER, "other": NEEDS_A_USER}
    with pytest.raises(APIError, match=r"chat template refuses them: .*default"):
        conversation_tokens(tokenizer, [Message(role="user", content="def f(x):")])
    tokenizer.chat_template["default"] = NEEDS_A_USER
    assert conversation_tokens(tokenizer, [Message(role="user", content="def f(x):")])


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_a_part_that_is_no_text_is_refused_by_place_and_type(kind: str) -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {"url": "data:image/png;base64,AAAA"}}]
    body = json.dumps({"model": "target", "messages": [{"role": "user", "content": parts}]}).encode()
    with pytest.raises(
        APIError, match=rf"^messages\.0\.content\.1: this server reads text only, not {kind}$"
    ) as refused:
        parse(ChatRequest, body)
    assert refused.value.status == 400
    with pytest.raises(APIError, match=r"^messages\.0\.content\.0\.text: Field required$"):
        parse(ChatRequest, body.replace(b', "text": "what is it?"', b""))


@pytest.mark.parametrize("hint", ["user", "safety_identifier", "prompt_cache_key"])
def test_hints_that_ask_for_nothing_are_taken(hint: str) -> None:
    asked: dict[str, Any] = {"model": "target", hint: "a"}
    parse(ChatRequest, json.dumps(asked | {"messages": user("hello")}).encode())
    parse(CompletionRequest, json.dumps(asked | {"prompt": "hello"}).encode())


def test_what_the_chat_template_refuses_is_a_400(llm: FakeLLM) -> None:
    llm.tokenizer = AutoTokenizer.from_pretrained(TARGET)
    llm.tokenizer.chat_template = CHATML
    with served(llm) as url, openai_at(url) as client:
        client.chat.completions.create(model="target", messages=user("hello"))
        with pytest.raises(openai.BadRequestError, match="system comes first"):
            client.chat.completions.create(model="target", messages=[*user("a"), {"role": "system", "content": "b"}])
    assert llm.calls[0].text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


# The command ----------------------------------------------------------------------------------------------------------


def test_a_host_open_to_others_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOTUNE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "example.org"):
        result = CliRunner().invoke(main, ["serve", str(tmp_path / "policy.json"), "--host", host])
        assert result.exit_code == 2
        assert "set AUTOTUNE_API_KEY" in result.output
    monkeypatch.setenv("AUTOTUNE_API_KEY", "s3cret")
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "policy.json"), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2
    assert "policy.json cannot be read" in result.output
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1")] == [True, True, True, False]


def test_an_address_in_use_and_a_missing_extra_are_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", str(tmp_path / "policy.json"), "--port", port])
    assert result.exit_code == 2
    assert f"--port {port}: Address already in use" in result.output
    monkeypatch.delitem(sys.modules, "autotune.serve.server")
    monkeypatch.delattr("autotune.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "policy.json")])
    assert result.exit_code == 2
    assert "pip install 'autotune-llm[serve]'" in result.output


def test_the_models_name_is_its_folders_or_the_hubs() -> None:
    assert model_name(Path("models/Llama-3-8B")) == "Llama-3-8B"
    assert model_name(Path("/hub/models--meta-llama--Llama-3-8B/snapshots/8cde5ca")) == "meta-llama/Llama-3-8B"


def test_a_served_policy_answers_a_conversation_that_crosses_a_rule_boundary(tmp_path: Path) -> None:
    write_policy(bundled_policy(longest=128), tmp_path / "policy.json")
    command = [sys.executable, "-m", "autotune", "serve", str(tmp_path / "policy.json"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            start = process.stderr.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", start)
            assert address, start + process.stderr.read()
            with openai_at(address[0]) as client:
                messages = user("class Stack:\n    def __init__(self):\n        self.items = []\n\n")
                replies, prompts = [], []
                for question in ("def main():\n", held_out_text()[:150], ""):
                    reply = client.chat.completions.create(model="target", messages=messages, temperature=0)
                    again = client.chat.completions.create(
                        model="target", messages=messages, temperature=0, stream=True
                    )
                    text = reply.choices[0].message.content
                    assert "".join(chunk.choices[0].delta.content or "" for chunk in again) == text
                    prompts.append(reply.usage.prompt_tokens)
                    replies.append(reply)
                    messages += [{"role": "assistant", "content": text}, *user(question)]
                assert client.completions.create(model="target", prompt="def main():", stop="\n").choices
            assert prompts[0] <= 64 < prompts[-1]
            cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in replies]
            assert cached[0] == 0
            assert cached[1] >= prompts[0]
            assert metrics(address[0])["ok"] == 7
        finally:
            process.send_signal(signal.SIGINT)
        log = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in log
    lines = [line for line in log.splitlines() if "/v1/" in line]
    assert len(lines) == 7
    for line in lines:
        assert all(word in line for word in ("rule up to", "tokens in", " out", "tokens/s", "peak")), line
    assert "rule up to 64" in lines[0]
    assert "cached" in lines[1]
    assert any("rule up to 128" in line for line in lines)
