"""A model and its cache for one request, launched operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import (
    Mark,
    copy_states,
    go_back_to,
    make_cache,
    mark,
    quantized,
    resume,
    rollback,
    room,
    seen_by_all,
    settle,
    states_of,
)
from .cache.state import StateCopy
from .embedding import HostEmbedding
from .rope import rope_of
from .support import Unsupported

AGAIN = 4  # tokens that go in again with the next pass at most: each count of tokens is recorded by itself. Chosen


class Runner:
    """Feeds tokens to a model and its cache, and returns logits [tokens, vocab]."""

    def __init__(
        self, model: PreTrainedModel, cache: str, capacity: int, device: str, embeddings: str, spare: int = 0
    ) -> None:
        self.model, self.device, self.capacity = model, device, capacity
        self._empty = partial(make_cache, cache, model.config, capacity, device, spare)
        self.cache: Cache = self._empty()
        self.rope = rope_of(model)
        # what the cache holds, where the rope depends on its length
        self.text = torch.empty(0, dtype=torch.int64, device=device)
        self.length, self.chunk = 0, 0  # of the text that the cache was prefilled for, and of its passes
        self.tokens = 0  # that the cache holds
        self.held: list[int] = []  # those that it is known to hold, between requests
        self.mark: Mark | None = None
        self.stateful = bool(states_of(self.cache))
        self._kept: list[StateCopy] = []  # the states before what may be rolled back
        self._as_kept = False  # whether the states are those
        self._since: list[torch.Tensor] | None = None  # what was fed since then, where it may be
        self._again = torch.empty_like(self.text)  # what stays of that, and goes in again before the next tokens
        taken = signature(type(model).forward).parameters
        self.argument = next((name for name in ("past_key_values", "cache_params") if name in taken), None)
        if self.argument is None:
            raise Unsupported(f"{model.config.model_type} takes no cache, and keeps its state in another way")
        self.positions = self.stateful and "position_ids" in taken  # some count from zero in each pass
        self.singly = getattr(model, "fed_singly", False)  # with a past, as `net` has found
        self.seen = seen_by_all(model.config)
        self.embed = HostEmbedding(model.get_input_embeddings()) if embeddings == "host" and device != "cpu" else None

    @property
    def room(self) -> int:
        return room(self.cache) - len(self._again)

    def feed(self, tokens: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """The logits after each of `tokens` ([n], on the device), or after the last `keep` of them."""
        if len(self._again):
            keep, tokens = keep or len(tokens), torch.cat([self._again, tokens])
            self._again = tokens[:0]
        if self.tokens and len(tokens) > self.alike:
            return self._feed_singly(tokens, keep)
        return self._feed(tokens, keep)

    def _feed(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        if self._outgrown(tokens):
            return self._prefill_anew()
        return self._forward(tokens, keep)

    @property
    def alike(self) -> int:
        """How many tokens one pass takes as they would be taken one by one."""
        return max(1, min(self._same(), self.seen - self.tokens))

    def _feed_singly(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        return torch.cat([self.feed(token).clone() for token in tokens.split(1)])[-keep:]

    def _same(self) -> int:
        """How many tokens may follow before the rope's factors change."""
        return 2**31 if self.rope is None else self.rope.same(len(self.text), self.length)

    def _outgrown(self, tokens: torch.Tensor) -> bool:
        """Take note of `tokens`; whether with them the text is longer than what its keys were rotated for."""
        if self.rope is None:
            return False
        self.text = torch.cat([self.text, tokens])
        return self.rope.anew and self.length <= self.rope.original < len(self.text)

    def _prefill_anew(self) -> torch.Tensor:
        """The whole text again, as long as it is now; the logits after its last token [1, vocab]."""
        self.mark = None
        self._restart()
        logits = self.prefill(self.text.tolist(), self.chunk)
        assert logits is not None
        return logits

    def _restart(self) -> None:
        self.cache, self.tokens = self._empty(), 0

    def _forward(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        if self.singly and self.tokens and len(tokens) > 1:
            return torch.cat([self._forward(token, 1) for token in tokens.split(1)])[-keep:]
        output = self.model(**self.inputs(tokens, self.tokens), use_cache=True, logits_to_keep=keep)
        self.fed(tokens)
        return output.logits[0]  # type: ignore[no-any-return]

    def fed(self, tokens: torch.Tensor) -> None:
        """Count what went into the cache."""
        self.tokens += len(tokens)
        self._as_kept = False
        if self._since is not None:
            self._since.append(tokens)

    def inputs(self, tokens: torch.Tensor, held: int | torch.Tensor) -> dict[str, Any]:
        """What the model is given for `tokens` [n] behind those that its cache holds, and the cache."""
        cache: dict[str, Any] = {self.argument: self.cache}  # type: ignore[dict-item]
        if self.positions:
            cache["position_ids"] = (held + torch.arange(len(tokens), device=self.device))[None]
        if self.embed is None:
            return {"input_ids": tokens[None], **cache}
        return {"inputs_embeds": self.embed(tokens)[None], **cache}

    def prefill(
        self,
        prompt: list[int],
        chunk: int,
        cached: int = 0,
        marking: bool = False,
        ended: Callable[[], bool] = lambda: False,
        more: int = 0,
    ) -> torch.Tensor | None:
        """Feed the prompt behind its first `cached` tokens in chunks; only the last position's logits are computed.

        With `marking` the state before the last chunk is kept, for the prompt that goes on from this one. None where
        it `ended` between two chunks. A rope that depends on the text's length is that of `more` tokens than these.
        """
        if self.rope is not None:
            self.text, self.chunk = torch.tensor(prompt, device=self.device), chunk
            self.length = len(prompt) + more
            self.rope.begin(self.length)
        logits = None
        parts = [*torch.tensor(prompt[cached:], device=self.device).split((0 if self.singly else chunk) or len(prompt))]
        if marking and self.stateful and not quantized(self.cache) and len(parts[-1]) > 1:
            parts[-1:] = parts[-1].split([len(parts[-1]) - 1, 1])  # where the next prompt is likely to go on
        for part in parts:
            if ended():
                return None
            if marking and part is parts[-1]:
                self.mark = None  # not two at a time
                self.mark = mark(self.cache, self.tokens, chunk)
            logits = self._forward(part, keep=1)
            self.settle()
        return logits

    def resume(self, prompt: list[int], chunk: int) -> int:
        """Go back to what the cache holds of the prompt as a fresh start would have it: so many tokens, 0 for nothing.

        At least the last token is left to be fed: its logits are not kept.
        """
        held, self.held = self.held, []
        self._let_go()
        if len(prompt) > self.seen or (self.rope is not None and not self._as_fresh(len(prompt))):
            return 0
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt[:-1], strict=False)))
        self.tokens = resume(self.cache, common, len(held), chunk, self.mark)
        return self.tokens

    def _let_go(self) -> None:
        """Of what an earlier request could have rolled back."""
        self._as_kept, self._again = False, self._again[:0]

    def _as_fresh(self, length: int) -> bool:
        """Whether what is held was rotated as a fresh start would for a prompt of so many tokens."""
        assert self.rope is not None
        lengths = (length, self.length, len(self.text))  # asked for, prefilled for, grown to
        beyond = [each > self.rope.original for each in lengths]
        return not any(beyond) or (all(beyond) and not self.rope.dynamic)

    def hold(self, tokens: list[int]) -> None:
        """The request is over: of what the cache holds, `tokens` are known."""
        self.held = tokens[: self.tokens]

    def settle(self) -> None:
        settle(self.cache)

    def keep(self) -> None:
        """What is fed from here on may be rolled back: a copy of each state is kept, which takes its memory once more.

        Keys and values are forgotten by their number. A state cannot forget; it goes back to the copy, and what stays
        is fed again in one pass with what follows.
        """
        if not self.stateful:
            return
        if len(self._again) > AGAIN:
            self.feed(self._again[:0], keep=1)
            self.settle()
        if not self._as_kept:
            self._kept = copy_states(self.cache, self._kept)
        self._since = []

    def rollback(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens; a model with states has to `keep` before it is fed them."""
        since, self._since = self._since, None
        if tokens > 0 and self.stateful:
            assert since is not None
            fed = torch.cat(since)
            self._forget(len(fed))
            go_back_to(self.cache, self._kept)
            self._as_kept, self._again = True, fed[: len(fed) - tokens]
        else:
            self._forget(tokens)
        settle(self.cache)

    def _forget(self, tokens: int) -> None:
        rollback(self.cache, tokens)
        self.tokens -= tokens
        self.text = self.text[: len(self.text) - tokens]

    def close(self) -> None:
        """Let go of what belongs to the cache."""
