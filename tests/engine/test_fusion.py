"""What a recorded step replaces computes what the model's own code does."""

from __future__ import annotations

import sys

import pytest
import torch

from autotune.engine.fusion import ROTARY, Fusion, rotates_halves
from tests.tiny_models import FAMILIES, tiny, tokens

NORMS = {"llama": 5, "tied-llama": 5, "qwen3": 9, "mistral": 5, "gemma3": 19, "gpt-neox": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_root_mean_square_norm_is_replaced_and_the_logits_stay(family: str) -> None:
    model = tiny(family)
    for index, parameter in enumerate(model.parameters()):  # norms with weights of one or zero would all look alike
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data += 0.3 * noise
    prompt = torch.tensor([tokens(40)])
    expected = model(prompt).logits
    fusion = Fusion(model)
    assert len(fusion.norms) == NORMS[family]
    with fusion.applied():
        assert sum("forward" in vars(module) for module in model.modules()) == NORMS[family]
        torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=0)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class HalfRMSNorm(torch.nn.Module):
        variance_epsilon = 1e-6

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(16), requires_grad=False)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(states, (16,), self.weight, 1e-6) / 2

    assert Fusion(HalfRMSNorm()).norms == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotary_embedding_that_turns_halves_is_recognised(family: str) -> None:
    assert rotates_halves(getattr(sys.modules[type(tiny(family)).__module__], ROTARY))


def test_one_that_turns_neighbours_is_not() -> None:
    from transformers.models.cohere import modeling_cohere

    assert not rotates_halves(getattr(modeling_cohere, ROTARY))
    assert not rotates_halves(lambda query, key: (query, key))
