"""Tiny random models of several architectures, whose greedy texts vary: no download, float32, milliseconds a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 89
WINDOW = 48  # of the models that have a sliding window: prompts are longer

_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_GROUPED, "tie_word_embeddings": False, **changes}))


def tied_llama(**changes: Any) -> PreTrainedModel:
    return llama(**{"tie_word_embeddings": True, **changes})


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_GROUPED, "head_dim": 16, **changes}))


def mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_GROUPED, "sliding_window": WINDOW, **changes}))


def gemma3(**changes: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    own = {"head_dim": 8, "num_hidden_layers": 3, "layer_types": kinds, "sliding_window": WINDOW}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_GROUPED, **own, "query_pre_attn_scalar": 8, **changes}))


def gpt_neox(**changes: Any) -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SIZE, **changes}))


FAMILIES = {
    "llama": llama,
    "tied-llama": tied_llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt-neox": gpt_neox,
}


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The same model for the same seed, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](**changes)
    model.generation_config.eos_token_id = None
    return model.float().eval().requires_grad_(False)


def draft_of(target: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A model that agrees with `target` often, not always: its weights with noise added."""
    from copy import deepcopy

    draft = deepcopy(target)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std(correction=0))
    return draft


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def tokens(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """A prompt in which a passage repeats, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    passage = torch.randint(0, vocabulary, (count // 3,), generator=generator)
    rest = torch.randint(0, vocabulary, (count - 2 * len(passage),), generator=generator)
    return torch.cat([passage, rest, passage]).tolist()


@torch.no_grad()  # not in inference mode, in which quanto's 4 bits cannot be
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([tokens(60)])).logits[0]


# Others, whose texts reach further than 512 tokens, for steps that are recorded.
_LONGER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": LlamaConfig(**_LONGER, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_LONGER, num_key_value_heads=2, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**_LONGER),
    "mistral": MistralConfig(**_LONGER, num_key_value_heads=2, sliding_window=40),
}
PROMPT = torch.randint(60, (90,), generator=torch.Generator().manual_seed(1)).tolist()


def make_model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that greedy texts do not settle on one token
    return model.eval().requires_grad_(False)


HEADS, DIM, LAYERS = 2, 8, 2  # of the keys and values that tests of caches make
QUANTIZED = ("quantized-8", "quantized-4", "quantized-2", "quantized-fp8")
