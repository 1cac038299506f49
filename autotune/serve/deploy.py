"""Run a model as its policy says, with the engine that was measured, inside the policy's budget.

One thread decodes, and callers queue for it: the first to come is the first to be served. Text goes to the caller's
thread piece by piece, so that a caller who reads slowly, or no longer, holds up nobody.

A cache is made as long as its rule's longest request, which is what was measured, and kept for the next request: the
turns of a conversation prefill only what is new. Recorded steps are kept with it, and those of several rules beside
each other until memory runs out for the first time; from then on one.
"""

from __future__ import annotations

import gc
import hashlib
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from ..config import ALLOCATOR, MIB, LoadGroup, mib
from ..engine.decode import Engine, Generation, Sampling
from ..measure.memory import Meter, out_of_memory
from ..policy.policy import ModelInfo, Policy, PolicyError, Rule

_SMALL = 64 * MIB  # bytes of a file that is hashed before loading, at most; chosen, not measured
FinishReason = Literal["stop", "length", "closed"]


class OutOfMemory(PolicyError):
    """A request that did not fit the budget, tried twice; the next one may."""


@dataclass(frozen=True)
class Served:
    """What one request did: the rule that it ran under, and what it took.

    `cached_tokens` of the prompt were in the cache from the request before. `finish_reason` is `stop` (a stop token or
    string), `length` (all new tokens came) or `closed` (by the caller).
    """

    rule: Rule
    prompt_tokens: int
    generation: Generation
    peak_bytes: int
    cached_tokens: int
    finish_reason: FinishReason

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the whole request, prefill included; 0 where it was closed before it began."""
        seconds = self.generation.ttft_s + self.generation.decode_s
        return len(self.generation.tokens) / seconds if seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were kept; None where none was drafted."""
        generation = self.generation
        return generation.accepted / generation.proposed if generation.proposed else None

    def summary(self) -> str:
        """One line for a person."""
        cached = f" ({self.cached_tokens} of them cached)" if self.cached_tokens else ""
        text = (
            f"{self.prompt_tokens} tokens in{cached}, {len(self.generation.tokens)} out, "
            f"{self.tokens_per_s:.1f} tokens/s (first after {self.generation.ttft_s:.2f} s), "
            f"rule up to {self.rule.max_context_tokens}, peak {mib(self.peak_bytes)}"
        )
        if self.acceptance is None:
            return text
        return f"{text}, acceptance {self.acceptance:.2f} at a mean depth of {self.generation.mean_depth:.1f}"


class _Text:
    """One request's text, written by the thread that decodes and read by the caller's."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.pieces: SimpleQueue[str | None] = SimpleQueue()  # None is the end
        self.closed = self.stopped = False
        self.shown = 0  # characters in `pieces`
        self.restart()

    def restart(self) -> None:
        """The same text again from its beginning; what was shown is not shown twice."""
        self.tokens: list[int] = []
        self.before = self.read = 0  # tokens[before:read] give what is read its context
        self.text = ""

    def ended(self) -> bool:
        return self.closed or self.stopped

    def add(self, tokens: list[int], last: bool = False) -> None:
        """Show what is certain: whole characters, without what may be the beginning of a stop string."""
        self.tokens += tokens
        whole = self._decode(self.before, len(self.tokens))
        if whole.endswith("\ufffd") and not last:  # a character's bytes may be split between tokens
            return
        new = whole[len(self._decode(self.before, self.read)) :]
        if new:
            self.before, self.read = self.read, len(self.tokens)
        begin, self.text = len(self.text), self.text + new
        end = self._first_stop(begin)
        if end is not None:
            self.stopped, self.text = True, self.text[:end]
        certain = len(self.text) - (0 if last or self.stopped else self._may_stop())
        if certain > self.shown:
            self.pieces.put(self.text[self.shown : certain])
            self.shown = certain

    def _decode(self, begin: int, end: int) -> str:
        return str(self.tokenizer.decode(self.tokens[begin:end], skip_special_tokens=True))

    def _first_stop(self, begin: int) -> int | None:
        """Where the stop string begins that is the first to be complete, the text being new from `begin` on."""
        found = [
            (at + len(word), at)
            for word in self.stop
            if (at := self.text.find(word, max(0, begin - len(word) + 1))) >= 0
        ]
        return min(found)[1] if found else None

    def _may_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        starts = [n for word in self.stop for n in range(1, len(word)) if self.text.endswith(word[:n])]
        return max(starts, default=0)


class Stream(Iterator[str]):
    """The text of one request, piece by piece. `request` tells after the end what it took, and is None before.

    Who stops reading must `close` it; so does garbage collection.
    """

    request: Served | None = None

    def __init__(self, text: _Text, running: Future[Served], unserved: Served):
        self._text, self._running, self._unserved, self._over = text, running, unserved, False

    def __next__(self) -> str:
        if not self._over:
            piece = self._text.pieces.get()
            if piece is not None:
                return piece
            self._over = True
            self._take()
        raise StopIteration

    def close(self) -> None:
        """End decoding within one step; returns when the next caller can be served. Pieces not yet read are lost.

        Any thread may close it: one that is waiting for the next piece gets the end.
        """
        if not self._over:
            self._over = True
            self._leave()
            if self._running.cancelled() or self._running.exception() is None:  # waits for it
                self._take()

    def __del__(self) -> None:
        self._leave()  # never waits: the thread that decodes may be the one that collects

    def _leave(self) -> None:
        self._text.closed = True
        if self._running.cancel():  # it had not begun, and never will
            self._text.pieces.put(None)

    def _take(self) -> None:
        self.request = self._unserved if self._running.cancelled() else self._running.result()


class LLM:
    """A model under its policy, for any number of threads: one request runs at a time, and callers queue."""

    last: Served  # the newest that has ended
    _engine: Engine

    def __init__(self, policy: Policy, device: str):
        self.policy, self.device = policy, device
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="autotune")
        self._tokenizing = threading.Lock()  # a fast tokenizer can be borrowed by one thread at a time
        self.tokenizer = AutoTokenizer.from_pretrained(policy.model.path, local_files_only=True)
        self._group: LoadGroup | None = None
        self._decoding.submit(self._begin).result()
        self._vocabulary = int(self._engine.target.config.get_text_config(decoder=True).vocab_size)

    def _begin(self) -> None:
        """On the thread that decodes, whose current device the meter sets."""
        self._meter = Meter(self.device, self.policy.budget_bytes)
        self._ready(self.policy.rules[-1])

    def _ready(self, rule: Rule) -> None:
        """Hold what the rule loads. What was held before goes first, so that the budget holds."""
        group = self.policy.configuration(rule).load_group
        if group == self._group:
            return
        self._group = None
        if "_engine" in vars(self):
            self._engine.close()
            del self._engine
        self._meter.begin()
        self._engine = Engine.load(self.policy.model.path, group, self.device)
        self._load_peak = self._meter.peaks()["peak_bytes"] or 0
        self._group = group

    def generate(
        self,
        prompt: str | list[int],
        *,
        new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """The prompt's continuation; arguments and errors are those of `stream`."""
        stream = self.stream(prompt, new_tokens=new_tokens, temperature=temperature, seed=seed, stop=stop)
        with closing(stream):
            return "".join(stream)

    def stream(
        self,
        prompt: str | list[int],
        *,
        new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Stream:
        """The continuation of a text or of token ids, piece by piece as it is decoded.

        It ends before the first of the `stop` strings, after `new_tokens` (by default as many as were measured), or
        where the model ends it. Temperature 0 is greedy; `seed` makes a sampled text repeatable, unless the rule's
        speculation is adaptive. Raises PolicyError at once for a request that the policy was not measured for; reading
        raises OutOfMemory for one that does not fit.
        """
        tokens = self._tokens(prompt)
        rule = self.policy.rule_for(len(tokens))
        asked = self._longest_text if new_tokens is None else new_tokens
        if not 1 <= asked <= self._longest_text:
            raise PolicyError(f"{asked} new tokens asked for; the policy was measured with {self._longest_text}")
        if not 0 <= temperature < float("inf"):
            raise PolicyError(f"temperature must be 0 or more, not {temperature}")
        if isinstance(stop, str) or not all(stop):
            raise PolicyError("stop must be a list of strings, none of them empty")
        text = _Text(self.tokenizer, tuple(stop))
        running = self._decoding.submit(self._run, text, tokens, rule, asked, Sampling(temperature, seed))
        return Stream(text, running, Served(rule, len(tokens), Generation([], 0.0), 0, 0, "closed"))

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            with self._tokenizing:
                tokens = list(self.tokenizer(prompt)["input_ids"])
        else:
            tokens = list(prompt)
        if not tokens:
            raise PolicyError("the prompt is empty")
        if not all(0 <= token < self._vocabulary for token in tokens):  # on a GPU it would end the process
            raise PolicyError(f"the prompt has token ids outside of the model's vocabulary of {self._vocabulary}")
        return tokens

    @property
    def _longest_text(self) -> int:
        return int(self.policy.workload["new_tokens"])

    def _run(self, text: _Text, tokens: list[int], rule: Rule, new_tokens: int, sampling: Sampling) -> Served:
        try:
            self._meter.begin()
            generation = self._generate(text, tokens, rule, new_tokens, sampling)
            text.add([], last=True)
            peak = max(self._meter.peaks()["peak_bytes"] or 0, self._load_peak)
            reason: FinishReason = "closed"
            if text.stopped or (generation.tokens and generation.tokens[-1] in self._engine.stop_tokens):
                reason = "stop"
            elif len(generation.tokens) == new_tokens:
                reason = "length"
            self.last = Served(rule, len(tokens), generation, peak, generation.cached_tokens, reason)
            return self.last
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # its caller may keep it: it must not keep tensors
            raise
        finally:
            text.pieces.put(None)

    def _generate(self, text: _Text, tokens: list[int], rule: Rule, new_tokens: int, sampling: Sampling) -> Generation:
        """Decode; where memory runs out, once more with nothing kept, as the rule was measured."""
        configuration = self.policy.configuration(rule)
        for keep in (rule.max_context_tokens + self._longest_text + configuration.depth + 1, 0):
            text.restart()
            try:
                self._ready(rule)
                return self._engine.generate(
                    tokens,
                    configuration,
                    new_tokens,
                    sampling=sampling,
                    stop=self._engine.stop_tokens,
                    on_tokens=text.add,
                    ended=text.ended,
                    keep=keep,
                )
            except Exception as error:
                if not out_of_memory(error) and not out_of_memory(error.__cause__):
                    raise
                traceback.clear_frames(error.__traceback__)
                reason = str(error).strip().partition("\n")[0].partition(" GPU 0 ")[0]
            if self._group is not None:
                self._engine.recover()
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()
        raise OutOfMemory(
            f"a prompt of {len(tokens)} tokens did not fit the budget of {mib(self.policy.budget_bytes)}: {reason}"
        )


def deploy(policy: str | Path | Policy, device: str | None = None) -> LLM:
    """Load what the policy says, inside its budget. Raises PolicyError for a policy that cannot be used here."""
    loaded = policy if isinstance(policy, Policy) else Policy.load(Path(policy))
    measured = str(loaded.environment.get("device_word", "cpu"))
    device = device or measured
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PolicyError(f"the policy was measured on {loaded.environment.get('device')}; there is no GPU here")
    if not Path(loaded.model.path).is_dir():
        raise PolicyError(f"the policy's model folder {loaded.model.path} does not exist: edit model.path")
    for model in [loaded.model, *loaded.drafts]:
        _check_files(model)
    if not torch.cuda.is_initialized():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)
    return LLM(loaded, device)


def _check_files(model: ModelInfo) -> None:
    """Raises PolicyError where a small file is not the one that was measured; `verify` reads the large ones."""
    for name, digest in model.files.items():
        path = Path(model.path) / name
        if not path.exists():
            raise PolicyError(f"{path} is missing, which the policy was measured with")
        if path.stat().st_size <= _SMALL and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise PolicyError(f"{path} has changed since the policy was measured: bring it back, or run autotune again")
