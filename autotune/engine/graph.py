"""Recorded steps: a decode step is launched as one CUDA graph instead of thousands of kernels.

Decoding one token at batch 1 takes a GPU a few milliseconds; launching its kernels one by one takes the host 30. So the
step is recorded once for each number of tokens that it takes, and replayed: its inputs lie in fixed buffers, the cache
is preallocated, and its lengths are tensors that are set before each replay. The host remains the one that counts: it
checks that the tokens fit before they are launched, since a write past the end would poison the process.

Steps are recorded when they are first needed. They belong to one cache, so both are kept for the requests that follow
with the same cache word and about the same length; and so is any cache that a conversation may go on from. Prompts are
still fed eagerly, into the same cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import Configuration, LoadGroup
from .attention import bind
from .cache import (
    WINDOW,
    Lengths,
    advance,
    copy_states,
    go_back_to,
    lengths_on_device,
    restart,
    room,
    stored_tokens,
)
from .fusion import Fusion
from .runner import Runner
from .support import Unsupported

DEVICES = ("cuda",)  # where steps can be recorded; the tests say "cpu", where a replay just runs the step
ATTENTIONS = ("eager", "sdpa", "split_kv")  # those that can mask, or know, what a fixed cache does not hold
LONGEST = WINDOW  # tokens of the longest step that is recorded: no deeper one can be rolled back


class CaptureFailed(Unsupported):
    """A step could not be recorded. The process must be replaced: the device's state is undefined after this."""

    poisons = True


def check_launch(configuration: Configuration, group: LoadGroup, device: str) -> bool:
    """Whether decode steps go through fixed buffers and lengths on the device. Raises Unsupported."""
    recorded = configuration.launch != "eager"
    if not recorded and group.attention != "split_kv":
        return False
    word = f"launch = {configuration.launch}" if recorded else "attention = split_kv"
    if device.partition(":")[0] not in DEVICES:
        raise Unsupported(f"{word} needs a GPU")
    if configuration.cache != "static" and not configuration.cache.startswith("quantized-"):
        raise Unsupported(f"{word} needs a cache of fixed shape (static or quantized-*), not {configuration.cache}")
    if group.attention not in ATTENTIONS:
        raise Unsupported(f"{word} works with attention = {', '.join(ATTENTIONS)}, not {group.attention}")
    if recorded and "bnb-int8" in (group.weights, group.draft_weights):
        raise Unsupported(f"{word} cannot record bnb-int8 products: they wait for the host")
    return True


def bucket(tokens: int) -> int:
    """The capacity that a cache for `tokens` tokens is given, so that similar requests share their recorded steps."""
    size = 256 if tokens <= 4096 else 512
    return -(-tokens // size) * size


Key = tuple[str, str, str, int]  # the words for cache, launch and attention, and the capacity


@dataclass
class Recordings:
    """What an engine keeps between requests: the newest runner of its target and of its draft.

    For requests that go on from earlier ones (`again`) runners without recorded steps are kept as well, and with
    `several` one for each key.
    """

    kept: dict[tuple[str, Key], Runner] = field(default_factory=dict)
    several: bool = True

    def runner(
        self,
        role: str,
        model: PreTrainedModel,
        configuration: Configuration,
        capacity: int,
        sizes: tuple[int, ...],
        device: str,
        group: LoadGroup,
        again: list[int] | None = None,
    ) -> tuple[Runner, int]:
        """The runner for a request of at most `capacity` tokens, whose steps mostly take `sizes` tokens.

        Also how many tokens it holds already of the prompt `again`.
        """
        recorded = check_launch(configuration, group, device)
        if again is None and not recorded:
            self.close()
            return Runner(model, configuration.cache, capacity, device, group.embeddings), 0
        if recorded:
            capacity = bucket(capacity)
        elif configuration.cache != "static" and not configuration.cache.startswith("quantized-"):
            capacity = 0  # it grows as it must
        key = (configuration.cache, configuration.launch, group.attention, capacity)
        if again is None or not self.several:
            self.drop(role, but=key)
            if role == "target" and (configuration.depth == 0 or not configuration.has_draft_model):
                self.drop("draft")
        kept = self.kept.pop((role, key), None)
        cached = kept.resume(again, configuration.prefill_chunk) if kept is not None and again is not None else 0
        if recorded:
            beside = self.kept.get(("target", key)) if role == "draft" else None
            pool = beside.pool if isinstance(beside, StepRunner) else None
            kept = kept or StepRunner(model, key, device, group.embeddings, pool)
            assert isinstance(kept, StepRunner)
            kept.start(sizes, cached)
        elif not cached:
            kept = None  # its memory goes before the next is made
            kept = Runner(model, configuration.cache, capacity, device, group.embeddings)
        assert kept is not None
        self.kept[role, key] = kept
        return kept, cached

    def drop(self, role: str, but: Key | None = None) -> None:
        for place in [place for place in self.kept if place[0] == role and place[1] != but]:
            self.kept.pop(place).close()

    def close(self) -> None:
        self.drop("target")
        self.drop("draft")


@functools.cache
def _recording_stream(device: str) -> torch.cuda.Stream:
    """One for all steps: cuBLAS keeps a workspace of 32 MiB for every stream that it was used on."""
    return torch.cuda.Stream(device)


def _new_pool(device: str) -> Any:
    """Memory for recorded steps: PyTorch takes 22 MiB at least for each such pool."""
    return None if device == "cpu" else torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Step:
    tokens: torch.Tensor  # ids [n]
    replay: Callable[[], torch.Tensor]  # returns logits [n, vocab], overwritten by the next replay


class StepRunner(Runner):
    """A runner whose short steps are replayed; longer ones, such as the prompt, run eagerly."""

    def __init__(self, model: PreTrainedModel, key: Key, device: str, embeddings: str, pool: Any = None) -> None:
        cache, self.launch, self.attention, capacity = self.key = key
        super().__init__(model, cache, capacity, device, embeddings, spare=LONGEST)
        # One memory pool for all graphs of a target and its draft, which never run at the same time; it ends with the
        # last of them.
        self.pool = pool or _new_pool(device)
        tokens, stored = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.lengths = Lengths(tokens, stored, read=self.attention != "split_kv")
        # torch.compile fuses by itself; a step that is launched eagerly is the model's own, as the prompt is
        self.fusion = Fusion(model).applied if self.launch == "graph" else nullcontext
        self.steps: dict[int, _Step] = {}
        self.sizes: tuple[int, ...] = ()

    def _bind(self, cache: Any) -> None:
        if self.attention == "split_kv":
            bind(self.model, cache)

    def start(self, sizes: tuple[int, ...], cached: int = 0) -> None:
        """Begin a request with `cached` tokens in the cache, and steps of `sizes` to which shorter ones are padded."""
        if not cached:
            restart(self.cache)
            self.tokens, self.held, self.mark = 0, [], None
            self._let_go()
        self.sizes = sizes
        self._bind(self.cache)

    def _restart(self) -> None:
        restart(self.cache)
        self.tokens = 0

    def close(self) -> None:
        self.steps.clear()
        self._bind(None)

    def _feed(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """As Runner's; the logits lie in a buffer that the next step of the same size overwrites."""
        count, held = len(tokens), self.tokens
        if held + count > self.capacity:
            raise ValueError(f"{held + count} tokens do not fit a cache of {self.capacity}")
        if self._outgrown(tokens):
            return self._prefill_anew()
        size = min((size for size in self.sizes if size >= count), default=count)
        if self.stateful or size - count > min(self._same(), self.seen - held - count):
            size = count  # what pads a step would count as text, and a state would see it
        if size > LONGEST or count > room(self.cache) or (self.singly and count > 1):
            return self._forward(tokens, keep)
        self.lengths.tokens.fill_(held)
        self.lengths.stored.fill_(stored_tokens(self.cache))
        if size not in self.steps:
            self.steps[size] = self._record(size)
        step = self.steps[size]
        step.tokens[:count].copy_(tokens)
        logits = step.replay()
        advance(self.cache, count)
        self.fed(tokens)
        return logits[count - keep if keep else 0 : count]

    def _record(self, size: int) -> _Step:
        tokens = torch.zeros(size, dtype=torch.int64, device=self.device)
        forward = torch.compile(self.model.forward, dynamic=False) if self.launch == "compile" else self.model.forward

        def run() -> torch.Tensor:
            with lengths_on_device(self.cache, self.lengths), self.fusion():
                output = forward(**self.inputs(tokens, self.lengths.tokens), use_cache=True)
            return output.logits[0]  # type: ignore[no-any-return]

        if self.launch == "eager" or self.device == "cpu":
            return _Step(tokens, run)
        states = copy_states(self.cache)
        self._warm_up(run)
        go_back_to(self.cache, states)
        return _Step(tokens, self._capture(run))

    def _warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        """Run the step where it will run again, so that whatever is made on first use exists before the recording."""
        from torch._dynamo.exc import TorchDynamoException

        stream = _recording_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), torch._dynamo.config.patch(recompile_limit=64):
                for _ in range(2):
                    run()
        except TorchDynamoException as error:
            raise Unsupported(f"launch = compile: {str(error).strip().splitlines()[0]}") from error
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the device meanwhile, to measure it
            stream = _recording_stream(self.device)
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                logits = run()
        except RuntimeError as error:
            raise CaptureFailed(f"the step could not be recorded: {str(error).strip().splitlines()[0]}") from error

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay
