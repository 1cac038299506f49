"""What has to hold before a model is believed: its steps through the cache say what one pass over all tokens says.

A model may keep its state in itself, or where no cache of ours reaches, count positions from zero in each pass, or
forget what came before when it is given several tokens at once. Each would be wrong text. It is seen in a few short
passes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .runner import Runner
from .support import Unsupported

HELD, FED = 16, 8  # tokens in the cache, and then fed; chosen: few, and more than a convolution reaches
# Shares of the logits' deviation, root mean square, by tiny models of each type on a CPU. What a type says step by step
# may differ from one pass over all by so much: right ones do by 7e-4 at most (0.023 in bfloat16), wrong ones by 1.
WRONG = 0.02, 0.2
# What it says for several tokens at once may differ from what it says one by one by so much: most do by 3e-6 (and twice
# the rounding in bfloat16), nemotron_h by 2e-4, zamba2 by 7e-4, and those that forget what came before by 0.1.
APART = 1e-4, 0.03


@torch.no_grad()  # which quanto-int4 on a CPU needs, and a few short passes can do with
def check_steps(model: PreTrainedModel, device: str, embeddings: str) -> bool:
    """Whether several tokens may be fed to a cache that holds some; if not, one by one. Raises Unsupported."""
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.vocab_size, (HELD + FED,), generator=generator).to(device)

    def logits(*counts: int) -> torch.Tensor:
        runner, other = (Runner(model, "dynamic", HELD + FED, device, embeddings) for _ in range(2))
        first, *rest = tokens.split(list(counts))
        begun = runner.feed(first)
        other.feed(tokens.flip(0))  # which a state that lies in the model would take for this one's
        return torch.cat([begun, *map(runner.feed, rest)])[HELD:].float()

    try:
        whole, single, several = logits(HELD + FED), logits(HELD, *[1] * FED), logits(HELD, FED)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as problem:
        raise Unsupported(
            f"{text.model_type} cannot go on from a cache of ours: {str(problem).splitlines()[0]}"
        ) from None
    half = model.dtype != torch.float32
    pairs = (single, whole), (several, single)
    error, apart = (float((a - b).square().mean().sqrt() / whole.std()) for a, b in pairs)
    if not error <= WRONG[half]:
        raise Unsupported(
            f"{text.model_type} says something else step by step through its cache than in one pass: "
            f"logits differ by {error:.2g} of their deviation"
        )
    return apart <= max(APART[half], 2 * error * half)
