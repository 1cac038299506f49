"""The one decode loop: prefill in chunks, then plain or speculative decoding, greedy or sampled, on any cache.

Speculative decoding is that of Leviathan et al. (arXiv 2211.17192): a draft proposes `depth` tokens, the target scores
them in one pass, the longest agreeing prefix is kept and one token of the target's own follows. Greedy output is that
of the target alone; sampled output has the target's distribution. Prompt lookup drafts the continuation of the latest
earlier occurrence of the last tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from ..config import HEAD_WEIGHTS, Configuration, LoadGroup, draft_head
from .cache import stored_bytes
from .depth import PROBE, AdaptiveDepth
from .graph import Recordings
from .load import lacks, load_model, usual_attention
from .net import check_steps
from .runner import Runner

_P = ParamSpec("_P")
_T = TypeVar("_T")
NGRAM = 3  # tokens of the longest suffix that prompt lookup searches for; chosen, not measured


@dataclass
class Generation:
    """What one request produced. `step_s` and `step_tokens` have an entry per decode step, the prefill excluded.

    `ttft_s` is from the request to the first token on the host; `decode_s` from there to the last.
    """

    tokens: list[int]
    ttft_s: float
    step_s: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    verifications: int = 0
    cached_tokens: int = 0  # of the prompt, from an earlier request
    cache_bytes: int = 0
    draft_cache_bytes: int = 0

    @property
    def decode_s(self) -> float:
        return sum(self.step_s)

    @property
    def mean_depth(self) -> float | None:
        """Drafted tokens per decode step; None where none was drafted."""
        return self.proposed / len(self.step_s) if self.proposed else None


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `seed` makes a sampled request repeatable, unless its depth adapts to measured times."""

    temperature: float = 0.0
    seed: int = 0


def _without_gradients(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Inference mode, which a small model is an eighth faster in; quanto's 4 bits fail in it on a CPU."""

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        engine: Any = args[0]
        words = (engine.group.weights, engine.group.draft_weights, HEAD_WEIGHTS.get(engine.group.lm_head))
        fails = engine.device == "cpu" and "quanto-int4" in words
        with torch.no_grad() if fails else torch.inference_mode():
            return method(*args, **kwargs)

    return wrapped


class Engine:
    """A loaded load group: the target, and the draft model where there is one."""

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel | None, group: LoadGroup, device: str):
        self.target, self.draft, self.group, self.device = target, draft, group, device
        self.ahead = device != "cpu"  # launch the step that follows before this one's token is read
        self._recordings = Recordings()
        self._adaptive: dict[Configuration, AdaptiveDepth] = {}  # what was learnt serves the requests that follow

    @classmethod
    def load(
        cls, folder: str, group: LoadGroup, device: str, progress: Callable[[str], None] = lambda phase: None
    ) -> Engine:
        """Read the load group's weights. Raises Unsupported; a CUDA or host allocation that fails passes through."""
        progress("loading the target")
        target = load_model(
            folder,
            weights=group.weights,
            lm_head=group.lm_head,
            embeddings=group.embeddings,
            attention=group.attention,
            device=device,
        )
        draft = None
        if group.draft != "none":
            progress("loading the draft")
            draft = load_model(
                group.draft,
                weights=group.draft_weights,
                lm_head=draft_head(group.draft_weights, device),
                embeddings=group.embeddings,
                attention=usual_attention(group.draft) if lacks(group.draft, group.attention) else group.attention,
                device=device,
            )
        progress("checking steps through the cache")
        for model in [target] if draft is None else [target, draft]:
            model.fed_singly = not check_steps(model, device, group.embeddings)  # type: ignore[assignment]
        return cls(target, draft, group, device)

    @property
    def stop_tokens(self) -> set[int]:
        """The tokens with which the target ends a text."""
        stop = self.target.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop} if stop is not None else set()

    @_without_gradients
    def generate(
        self,
        prompt: list[int],
        configuration: Configuration,
        new_tokens: int,
        *,
        sampling: Sampling = Sampling(),
        stop: Collection[int] = (),
        on_tokens: Callable[[list[int]], None] = lambda tokens: None,
        ended: Callable[[], bool] = lambda: False,
        keep: int = 0,
    ) -> Generation:
        """Continue `prompt` by at most `new_tokens` tokens, ending early at a token of `stop`.

        `ended` is asked after every prefill chunk and step; once it is true, no other follows. With `keep` the caches
        are made for that many tokens, kept, and gone on from where an earlier request with `keep` began as this one
        does: its tokens are not prefilled again. The text is that of a fresh start (exactly in float32; in bf16 up to
        rounding). A quantized cache goes on from the last whole prefill chunk of the prompt before, or from nothing.
        """
        capacity = max(keep, len(prompt) + new_tokens + configuration.depth + 1)
        again = prompt if keep else None
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        began = time.perf_counter()
        sizes = (1, *(depth + 1 for depth in configuration.depths))
        target, cached = self._runner("target", configuration, capacity, sizes, again)
        drafter = self._drafter(configuration, prompt, capacity, again)
        logits = target.prefill(prompt, configuration.prefill_chunk, cached, again is not None, ended)
        first = [] if logits is None else [int(_choose(logits[-1], sampling, generator))]
        if drafter is not None and first:
            drafter.start(prompt, ended)
        now = time.perf_counter()
        result = Generation(first, now - began, cached_tokens=cached)
        on_tokens(list(first))
        plain = _Plain(target, first, new_tokens, sampling, generator, self.ahead) if drafter is None else None
        adaptive = None
        if configuration.speculation == "adaptive":
            adaptive = self._adaptive.setdefault(configuration, AdaptiveDepth(configuration.depths))
        while not ended() and len(result.tokens) < new_tokens and result.tokens[-1] not in stop:
            if plain is not None:
                tokens = [plain.next()]
            else:
                assert drafter is not None
                room = min(target.room, target.alike)
                limit = min(configuration.depth, room - 1, new_tokens - len(result.tokens) - 1)
                tokens = self._step(target, drafter, result, limit, adaptive, sampling, generator)
            stopped = next((i for i, token in enumerate(tokens) if token in stop), None)
            tokens = tokens if stopped is None else tokens[: stopped + 1]
            result.tokens += tokens
            then, now = now, time.perf_counter()
            result.step_s.append(now - then)
            result.step_tokens.append(len(tokens))
            on_tokens(tokens)
        result.cache_bytes = stored_bytes(target.cache)
        if isinstance(drafter, _ModelDraft):
            result.draft_cache_bytes = stored_bytes(drafter.runner.cache)
        if keep:
            target.hold(prompt + result.tokens)
            if isinstance(drafter, _ModelDraft):
                drafter.runner.hold(prompt + result.tokens)
        return result

    def _step(
        self,
        target: Runner,
        drafter: _ModelDraft | _PromptLookup,
        result: Generation,
        depth: int,
        adaptive: AdaptiveDepth | None,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> list[int]:
        """One speculative step of at most `depth` drafted tokens: the tokens that it adds, at least one."""
        began = time.perf_counter()
        depth = depth if adaptive is None else adaptive.choose(depth)
        pending = torch.tensor([result.tokens[-1]], device=self.device)
        proposal = drafter.propose(result.tokens, depth, sampling, generator) if depth > 0 else None
        if proposal is None:
            logits = target.feed(pending)
            token = int(_choose(logits[-1], sampling, generator))
            target.settle()
            drafter.accept(0, 0)
            if adaptive is not None:
                adaptive.observe(0, 0, time.perf_counter() - began)
            return [token]
        drafted, draft_probabilities = proposal
        target.keep()
        logits = target.feed(torch.cat([pending, drafted]))
        kept, tokens = _verify(logits, drafted, draft_probabilities, sampling, generator)
        target.rollback(len(drafted) - kept)
        drafter.accept(len(drafted), kept)
        result.proposed += len(drafted)
        result.accepted += kept
        result.verifications += 1
        if adaptive is not None:
            adaptive.observe(len(drafted), kept, time.perf_counter() - began)
        return tokens

    def close(self) -> None:
        """Let go of the caches and graphs that are kept for further requests."""
        self._recordings.close()

    def recover(self) -> None:
        """Memory ran out: let go of all that is kept, and keep no more than one cache for a model from now on."""
        self._recordings.several = False
        self.close()

    def _drafter(
        self, configuration: Configuration, prompt: list[int], capacity: int, again: list[int] | None
    ) -> _ModelDraft | _PromptLookup | None:
        if configuration.depth == 0:
            return None
        if configuration.draft == "prompt-lookup":
            return _PromptLookup(prompt, self.device)
        # after a verification it has one or two tokens to see; where there was none for a while, those as well
        sizes = (1, 2) if configuration.speculation == "constant" else (1, 2, PROBE + 2)
        runner, cached = self._runner("draft", configuration, capacity, sizes, again)
        sides = _rows(runner.model), _rows(self.target)
        return _ModelDraft(runner, configuration.prefill_chunk, cached, again is not None, *sides)

    def _runner(
        self,
        role: str,
        configuration: Configuration,
        capacity: int,
        sizes: tuple[int, ...],
        again: list[int] | None = None,
    ) -> tuple[Runner, int]:
        """A runner for one request of at most `capacity` tokens, and how many tokens of `again` it holds already."""
        model = self.target if role == "target" else self.draft
        assert model is not None
        return self._recordings.runner(role, model, configuration, capacity, sizes, self.device, self.group, again)

    @_without_gradients
    def score(
        self, prompt: list[int], continuation: list[int], configuration: Configuration, step: int
    ) -> torch.Tensor:
        """The logits that predict each token of `continuation` after `prompt`, through the cache in use.

        The prompt is prefilled in the configuration's chunks, then the continuation is fed `step` tokens at a time.
        Returns [len(continuation), vocab] on the host, in the model's dtype.
        """
        target, _ = self._runner("target", configuration, len(prompt) + len(continuation), (step,))
        logits = target.prefill(prompt, configuration.prefill_chunk, more=len(continuation) - 1)
        assert logits is not None
        rows = [logits[-1:].cpu()]
        for begin in range(0, len(continuation) - 1, step):
            tokens = torch.tensor(continuation[begin : min(begin + step, len(continuation) - 1)], device=self.device)
            rows.append(target.feed(tokens).cpu())
            target.settle()
        return torch.cat(rows)


def _rows(model: PreTrainedModel) -> int:
    """The tokens that the model has an embedding for."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


class _Plain:
    """Decoding without speculation, a token at a time.

    With `ahead`, the step that follows is launched before this one's token is read, so that a GPU never waits for the
    host; the last of them is in vain where a text ends early.
    """

    def __init__(
        self,
        target: Runner,
        first: list[int],
        new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        ahead: bool,
    ) -> None:
        self.target, self.sampling, self.generator, self.ahead = target, sampling, generator, ahead
        self.newest = torch.tensor(first, device=target.device)
        self.left = new_tokens - 1  # steps that may still be launched
        self.waiting: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def next(self) -> int:
        while self.left and len(self.waiting) < 1 + self.ahead:
            self._launch()
        token, ready = self.waiting.pop(0)
        if ready is not None:
            ready.synchronize()
        return int(token)

    def _launch(self) -> None:
        logits = self.target.feed(self.newest)
        self.newest = _choose(logits[-1], self.sampling, self.generator)[None]
        self.target.settle()
        self.left -= 1
        ready = None
        token = self.newest.to("cpu", non_blocking=True)
        if self.newest.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.waiting.append((token, ready))


class _ModelDraft:
    """A draft model with a cache of its own. `unseen` are accepted tokens that its cache does not hold yet.

    It has `rows` tokens, the target `vocabulary`. Those that the target lacks are never proposed; in place of one that
    it lacks itself the draft is shown its last, which costs acceptance and no exactness.
    """

    def __init__(self, runner: Runner, chunk: int, cached: int, marking: bool, rows: int, vocabulary: int):
        self.runner, self.chunk, self.cached, self.marking = runner, chunk, cached, marking
        self.rows, self.vocabulary = rows, vocabulary
        self.seen = 0  # accepted tokens of the result that are in the cache

    def _known(self, tokens: list[int]) -> list[int]:
        return tokens if self.rows >= self.vocabulary else [min(token, self.rows - 1) for token in tokens]

    def start(self, prompt: list[int], ended: Callable[[], bool] = lambda: False) -> None:
        self.runner.prefill(self._known(prompt), self.chunk, self.cached, self.marking, ended)

    def propose(
        self, tokens: list[int], depth: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Up to `depth` tokens [k] and, when sampling, the distributions [k, vocab] that they were drawn from."""
        unseen = torch.tensor(self._known(tokens[self.seen :]), device=self.runner.device)
        while len(unseen) > 1 and len(unseen) + depth - 1 > self.runner.room:  # catch up, then quantize what is final
            self.runner.feed(unseen[:1], keep=1)
            self.runner.settle()
            self.seen, unseen = self.seen + 1, unseen[1:]
        depth = min(depth, self.runner.room - len(unseen) + 1)
        drafted: list[torch.Tensor] = []
        probabilities: list[torch.Tensor] = []
        feed = unseen
        for _ in range(depth):
            logits = self.runner.feed(feed, keep=1)[-1][: self.vocabulary]
            if not drafted:
                self.runner.keep()  # what it was given so far stays
            feed = _choose(logits, sampling, generator)[None]
            drafted.append(feed)
            if sampling.temperature > 0:
                own = _distribution(logits, sampling)
                probabilities.append(torch.nn.functional.pad(own, (0, self.vocabulary - len(own))))
        self.seen += len(unseen)
        return torch.cat(drafted), torch.stack(probabilities) if probabilities else None

    def accept(self, proposed: int, kept: int) -> None:
        if proposed:
            cached = proposed - 1  # the last proposed token was never fed
            self.runner.rollback(cached - min(kept, cached))
            self.seen += min(kept, cached)


class _PromptLookup:
    """Proposes what followed the latest earlier occurrence of the last NGRAM (or fewer) tokens."""

    def __init__(self, prompt: list[int], device: str):
        self.text, self.device = list(prompt), device
        self.latest: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after it
        self.indexed = 0
        self.taken = 0

    def start(self, prompt: list[int], ended: Callable[[], bool] = lambda: False) -> None:
        self._index()

    def _index(self) -> None:
        """Index every n-gram that some token already follows."""
        for after in range(self.indexed + 1, len(self.text)):
            for size in range(1, min(NGRAM, after) + 1):
                self.latest[tuple(self.text[after - size : after])] = after
        self.indexed = max(self.indexed, len(self.text) - 1)

    def propose(
        self, tokens: list[int], depth: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        self.text += tokens[self.taken :]
        self.taken = len(tokens)
        self._index()
        for size in range(min(NGRAM, len(self.text)), 0, -1):
            begin = self.latest.get(tuple(self.text[-size:]))
            if begin is not None:
                return torch.tensor(self.text[begin : begin + depth], device=self.device), None
        return None

    def accept(self, proposed: int, kept: int) -> None:
        pass


def _distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return torch.softmax(logits.float() / sampling.temperature, dim=-1)


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits [..., vocab]; a CPU finds it three times faster in float32 than in bfloat16."""
    return logits.argmax(-1) if logits.is_cuda else logits.float().argmax(-1)


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token, as a scalar tensor, from logits [vocab]."""
    if sampling.temperature == 0:
        return _largest(logits)
    return torch.multinomial(_distribution(logits, sampling), 1, generator=generator)[0]


def _verify(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    draft_probabilities: torch.Tensor | None,
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[int, list[int]]:
    """How many drafted tokens [k] are kept, and the tokens that the step adds; asks the device once.

    `logits` [k + 1, vocab] are the target's at each drafted position and after the last. Sampling follows Leviathan et
    al., algorithm 1: keep a token with probability min(1, p / q), else draw from the normalized max(0, p - q).
    """
    count = len(drafted)
    if sampling.temperature == 0:
        own = _largest(logits)
        kept = (own[:-1] == drafted).cumprod(0).sum()
        answer = torch.cat([kept[None], own[None].flatten()]).tolist()
        return answer[0], answer[1 : answer[0] + 2]
    target = _distribution(logits, sampling)
    if draft_probabilities is None:
        draft_probabilities = torch.nn.functional.one_hot(drafted, target.shape[-1]).float()
    position = torch.arange(count, device=drafted.device)
    ratio = target[position, drafted] / draft_probabilities[position, drafted]
    draws = torch.rand(count, generator=generator, device=drafted.device)
    kept = (draws < ratio).cumprod(0).sum()
    padded = torch.cat([draft_probabilities, torch.zeros_like(target[:1])])
    rest = (target[kept] - padded[kept]).clamp(min=0)
    own_token = torch.multinomial(rest, 1, generator=generator)
    answer = torch.cat([kept[None], drafted, own_token]).tolist()
    return answer[0], [*answer[1 : answer[0] + 1], answer[-1]]
