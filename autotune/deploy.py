"""Run a model as its policy says, with the engine that was measured, inside the policy's budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
from transformers import AutoTokenizer

from .config import LoadGroup, mib
from .engine.decode import Engine, Generation, Sampling
from .measure.memory import Meter
from .policy import Policy, PolicyError, Rule, read_policy


@dataclass(frozen=True)
class Request:
    """What one request did: the rule that it ran under, and what it took."""

    rule: Rule
    prompt_tokens: int
    generation: Generation
    peak_bytes: int

    def summary(self) -> str:
        """One line for a person."""
        generation = self.generation
        seconds = generation.ttft_s + generation.decode_s
        text = (
            f"{self.prompt_tokens} tokens in, {len(generation.tokens)} out, "
            f"{len(generation.tokens) / seconds:.1f} tokens/s (first after {generation.ttft_s:.2f} s), "
            f"rule up to {self.rule.max_context_tokens}, peak {mib(self.peak_bytes)}"
        )
        if generation.proposed:
            text += f", acceptance {generation.accepted / generation.proposed:.2f}"
        return text


class LLM:
    """A model under its policy. Callers queue: one request runs at a time."""

    last: Request

    def __init__(self, policy: Policy, device: str):
        self.policy, self.device = policy, device
        self._lock = threading.Lock()
        self._meter = Meter(device, policy.budget_bytes)
        self.tokenizer = AutoTokenizer.from_pretrained(policy.model.path, local_files_only=True)
        self._group: LoadGroup | None = None
        self._ready(policy.rules[-1])

    def _ready(self, rule: Rule) -> None:
        """Hold what the rule loads. What was held before goes first, so that the budget holds."""
        group = self.policy.configuration(rule).load_group
        if group == self._group:
            return
        self._group = None
        vars(self).pop("_engine", None)
        self._meter.begin()
        self._engine = Engine.load(self.policy.model.path, group, self.device)
        self._load_peak = self._meter.peaks()["peak_bytes"] or 0
        self._group = group

    def generate(self, prompt: str, *, new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0) -> str:
        """The prompt's continuation. Raises PolicyError for a prompt past the longest that was measured."""
        return "".join(self.stream(prompt, new_tokens=new_tokens, temperature=temperature, seed=seed))

    def stream(
        self, prompt: str, *, new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is decoded; `last` tells afterwards what it took."""
        tokens = self.tokenizer(prompt)["input_ids"]
        if not tokens:
            raise PolicyError("the prompt is empty")
        rule = self.policy.rule_for(len(tokens))
        measured = int(self.policy.workload["new_tokens"])
        asked = measured if new_tokens is None else new_tokens
        if asked > measured:
            raise PolicyError(f"{asked} new tokens asked for; the policy was measured with {measured}")
        with self._lock:
            yield from self._stream(tokens, rule, asked, Sampling(temperature, seed))

    def _stream(self, tokens: list[int], rule: Rule, new_tokens: int, sampling: Sampling) -> Iterator[str]:
        queue: Queue[list[int] | None] = Queue()
        answer: list[Generation | BaseException] = []
        self._ready(rule)

        def work() -> None:
            try:
                answer.append(
                    self._engine.generate(
                        tokens,
                        self.policy.configuration(rule),
                        new_tokens,
                        sampling=sampling,
                        stop=self._stop_tokens(),
                        on_tokens=queue.put,
                    )
                )
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                answer.append(error)
            finally:
                queue.put(None)

        self._meter.begin()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        seen: list[int] = []
        shown = ""
        while (piece := queue.get()) is not None:
            seen += piece
            text = str(self.tokenizer.decode(seen, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # a character's bytes may be split between tokens
                yield text[len(shown) :]
                shown = text
        thread.join()
        if isinstance(answer[0], BaseException):
            raise answer[0]
        peak = max(self._meter.peaks()["peak_bytes"] or 0, self._load_peak)
        self.last = Request(rule, len(tokens), answer[0], peak)

    def _stop_tokens(self) -> set[int]:
        stop = self._engine.target.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop} if stop is not None else set()


def deploy(policy: str | Path | Policy, device: str | None = None) -> LLM:
    """Load what the policy says, inside its budget. Raises PolicyError for a policy that cannot be used here."""
    loaded = policy if isinstance(policy, Policy) else read_policy(Path(policy))
    measured = str(loaded.environment.get("device_word", "cpu"))
    device = device or measured
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PolicyError(f"the policy was measured on {loaded.environment.get('device')}; there is no GPU here")
    if not Path(loaded.model.path).is_dir():
        raise PolicyError(f"the policy's model folder {loaded.model.path} does not exist: edit model.path")
    return LLM(loaded, device)
