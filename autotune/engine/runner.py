"""A model and its cache for one request, launched operation by operation."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import make_cache, rollback, room, settle


class Runner:
    """Feeds tokens to a model and its cache, and returns logits [tokens, vocab]."""

    def __init__(
        self, model: PreTrainedModel, cache: str, capacity: int, device: str, embeddings: str, spare: int = 0
    ) -> None:
        self.model, self.device, self.capacity = model, device, capacity
        self.cache: Cache = make_cache(cache, model.config, capacity, device, spare)
        self.host_embeddings = model.get_input_embeddings() if embeddings == "host" and device != "cpu" else None

    @property
    def room(self) -> int:
        return room(self.cache)

    def feed(self, tokens: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """The logits after each of `tokens` ([n], on the device), or after the last `keep` of them."""
        return self._forward(tokens, keep)

    def _forward(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        inputs = {"input_ids": tokens[None]}
        if self.host_embeddings is not None:
            inputs = {"inputs_embeds": self.host_embeddings(tokens.cpu())[None].to(self.device)}
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        return output.logits[0]  # type: ignore[no-any-return]

    def prefill(self, prompt: list[int], chunk: int) -> torch.Tensor:
        """Feed the prompt in chunks; only the last position's logits are ever computed."""
        tokens = torch.tensor(prompt, device=self.device)
        for part in tokens.split(chunk or len(prompt)):
            logits = self._forward(part, keep=1)
            self.settle()
        return logits

    def settle(self) -> None:
        settle(self.cache)

    def rollback(self, tokens: int) -> None:
        rollback(self.cache, tokens)
        settle(self.cache)
