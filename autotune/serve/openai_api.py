"""The forms of OpenAI's API: requests, refusals, replies, and a conversation as one prompt.

https://platform.openai.com/docs/api-reference describes them. What the engine cannot honour is refused by name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..policy.policy import PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .deploy import LLM, Served, Stream

# Parameters of OpenAI's API that the engine does not have, and the values of them that ask for nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
    "annotations": ([],),
}
FAILED = {
    "error": {"message": "the server failed; its log says why", "type": "server_error", "param": None, "code": None}
}


class APIError(Exception):
    """A refusal in the API's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request have in common. The defaults are the API's."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def start(self, llm: LLM, tokens: list[int]) -> Callable[[], Stream]:
        """What begins the decoding when it is called."""
        return partial(
            llm.stream,
            tokens,
            new_tokens=self.new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=random.getrandbits(62) if self.seed is None else self.seed,
            stop=self.stops,
        )

    def refuse_what_is_not_honoured(self) -> None:
        for name, value in (self.model_extra or {}).items():
            _refuse_unless_harmless(name, value)
        if not all(self.stops) or len(self.stops) > 4:
            raise APIError(400, "stop: give up to four strings, none of them empty", "stop")


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    ID: ClassVar = "chatcmpl"
    WHOLE: ClassVar = "chat.completion"
    PIECE: ClassVar = "chat.completion.chunk"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        for number, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                _refuse_unless_harmless(name, value, f"messages.{number}.{name}")
        return conversation_tokens(tokenizer, self.messages)

    @staticmethod
    def piece(text: str, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    @staticmethod
    def whole(text: str, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    ID: ClassVar = "cmpl"
    WHOLE: ClassVar = "text_completion"
    PIECE: ClassVar = "text_completion"

    prompt: str | list[str] | list[int] | list[list[int]]

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise APIError(400, "prompt: one prompt a request; send the others by themselves", "prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return _encode(tokenizer, prompt, special=True)
        if any(not 0 <= token < len(tokenizer) for token in prompt):
            raise APIError(400, f"prompt: tokens are numbers from 0 to {len(tokenizer) - 1}", "prompt")
        return list(prompt)

    @staticmethod
    def piece(text: str, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    @staticmethod
    def whole(text: str, finish: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def _refuse_unless_harmless(name: str, value: Any, param: str | None = None) -> None:
    if value is None or any(
        value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in _HARMLESS.get(name, ())
    ):
        return
    known = "is not supported by this server" if name in _HARMLESS else "is no parameter that this server knows"
    raise APIError(400, f"{param or name} {known}; leave it out", param or name, "unsupported_parameter")


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """A conversation as the prompt of its next reply: by the tokenizer's chat template, or where it has none plainly.

    The plain form is for models that only continue text: the messages in order without their roles, a line break before
    each but the assistant's, which continue what stands before them. The text is tokenized in parts that end where the
    assistant's messages begin, so that the tokens of one turn's prompt begin those of the next, and its cache serves
    again; unless tokenizing in parts would change the text (some tokenizers put a space before each).
    """
    template = tokenizer.chat_template is not None
    plain = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]

    def rendered(turns: list[dict[str, str]]) -> str:
        if template:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        breaks = ["" if turn["role"] == "assistant" or number == 0 else "\n" for number, turn in enumerate(turns)]
        return "".join(gap + turn["content"] for gap, turn in zip(breaks, turns, strict=True))

    try:
        text = rendered(plain)
        starts = [rendered(plain[:at]) for at, turn in enumerate(plain) if at and turn["role"] == "assistant"]
    except TemplateError as error:
        raise APIError(400, f"messages: the model's chat template refuses them: {error}", "messages") from None
    parts, done = [], 0
    for start in starts:
        if text.startswith(start) and len(start) > done:
            parts.append(text[done : len(start)])
            done = len(start)
    parts.append(text[done:])
    tokens = [_encode(tokenizer, part, special=not template and not at) for at, part in enumerate(parts)]
    in_parts = [token for part in tokens for token in part]
    whole = _encode(tokenizer, text, special=not template)
    return in_parts if tokenizer.decode(in_parts) == tokenizer.decode(whole) else whole


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def parse(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> ChatRequest | CompletionRequest:
    """The request in a body. Raises APIError, naming the parameter, for one that is malformed or not honoured."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise APIError(400, f"{where or 'the body'}: {first['msg']}", str(first["loc"][0]) if where else None) from None
    asked.refuse_what_is_not_honoured()
    return asked


def prompt_tokens(llm: LLM, asked: ChatRequest | CompletionRequest) -> list[int]:
    """The prompt's tokens. Raises APIError for what the policy does not cover."""
    tokens = asked.tokens(llm.tokenizer)
    prompt = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if not tokens:
        raise APIError(400, f"{prompt}: there is no text to continue", prompt)
    try:
        llm.policy.rule_for(len(tokens))
    except PolicyError as error:
        raise APIError(400, f"{prompt}: {error}", prompt, "context_length_exceeded") from None
    most = int(llm.policy.workload["new_tokens"])
    if (asked.new_tokens or 0) > most:
        limit = "max_tokens" if asked.new_tokens == asked.max_tokens else "max_completion_tokens"
        raise APIError(400, f"{limit}: the policy was measured with {most} new tokens; ask for no more", limit)
    return tokens


def usage(served: Served) -> dict[str, Any]:
    """What a request took, as the API counts it."""
    out = len(served.generation.tokens)
    return {
        "prompt_tokens": served.prompt_tokens,
        "completion_tokens": out,
        "total_tokens": served.prompt_tokens + out,
        "prompt_tokens_details": {"cached_tokens": served.cached_tokens},
    }
