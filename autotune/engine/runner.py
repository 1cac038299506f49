"""A model and its cache for one request, launched operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import takewhile

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import Mark, make_cache, mark, resume, rollback, room, settle
from .embedding import HostEmbedding
from .rope import rope_of


class Runner:
    """Feeds tokens to a model and its cache, and returns logits [tokens, vocab]."""

    def __init__(
        self, model: PreTrainedModel, cache: str, capacity: int, device: str, embeddings: str, spare: int = 0
    ) -> None:
        self.model, self.device, self.capacity = model, device, capacity
        self._empty = partial(make_cache, cache, model.config, capacity, device, spare)
        self.cache: Cache = self._empty()
        self.held: list[int] = []  # the tokens that the cache is known to hold, between requests
        self.mark: Mark | None = None
        self.rope = rope_of(model)
        self.text = torch.empty(
            0, dtype=torch.int64, device=device
        )  # what the cache holds, where the rope depends on its length
        self.length, self.chunk = 0, 0  # of the text that the cache was prefilled for, and of its passes
        self.embed = HostEmbedding(model.get_input_embeddings()) if embeddings == "host" and device != "cpu" else None

    @property
    def room(self) -> int:
        return room(self.cache)

    def feed(self, tokens: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """The logits after each of `tokens` ([n], on the device), or after the last `keep` of them."""
        if self._outgrown(tokens):
            return self._prefill_anew()
        return self._forward(tokens, keep)

    @property
    def alike(self) -> int:
        """How many tokens one pass takes as they would be taken one by one."""
        return max(1, self._same())

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
        self.cache = self._empty()

    def _forward(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        output = self.model(**self.inputs(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        return output.logits[0]  # type: ignore[no-any-return]

    def inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is given for `tokens` [n]."""
        if self.embed is None:
            return {"input_ids": tokens[None]}
        return {"inputs_embeds": self.embed(tokens)[None]}

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
        parts = torch.tensor(prompt[cached:], device=self.device).split(chunk or len(prompt))
        for part in parts:
            if ended():
                return None
            if marking and part is parts[-1]:
                self.mark = None  # not two at a time
                self.mark = mark(self.cache, chunk)
            logits = self._forward(part, keep=1)
            self.settle()
        return logits

    def resume(self, prompt: list[int], chunk: int) -> int:
        """Go back to what the cache holds of the prompt as a fresh start would have it: so many tokens, 0 for nothing.

        At least the last token is left to be fed: its logits are not kept.
        """
        held, self.held = self.held, []
        if self.rope is not None and not self._as_fresh(len(prompt)):
            return 0
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt[:-1], strict=False)))
        return resume(self.cache, common, chunk, self.mark)

    def _as_fresh(self, length: int) -> bool:
        """Whether what is held was rotated as a fresh start would for a prompt of so many tokens."""
        assert self.rope is not None
        lengths = (length, self.length, len(self.text))  # asked for, prefilled for, grown to
        beyond = [each > self.rope.original for each in lengths]
        return not any(beyond) or (all(beyond) and not self.rope.dynamic)

    def hold(self, tokens: list[int]) -> None:
        """The request is over: of what the cache holds, `tokens` are known."""
        self.held = tokens[: self.cache.get_seq_length()]

    def settle(self) -> None:
        settle(self.cache)

    def rollback(self, tokens: int) -> None:
        rollback(self.cache, tokens)
        settle(self.cache)
        self.text = self.text[: len(self.text) - tokens]

    def close(self) -> None:
        """Let go of what belongs to the cache."""
