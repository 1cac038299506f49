"""What has to hold before a model is believed: its steps through the cache say what one pass over all tokens says.

A model may keep its state where no cache of ours reaches, count positions from zero in each pass, or forget what came
before when it is given several tokens at once. Each would be wrong text. It is seen in a few short passes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .runner import Runner
from .support import Unsupported

HELD, FED = 16, 8  # tokens in the cache, and then fed; chosen: few, and more than a convolution reaches
ROUNDING = {torch.float32: 0.02}  # of the logits' deviation, root mean square: tiny models gave 4e-5, wrong ones 0.1 up
ROUNDING_HALF = 0.2  # the same in bfloat16; chosen between what rounding gives, about 0.03, and what is wrong, about 1
APART = 3.0  # times the error of single tokens, the most that several at once may have; chosen, not measured


@torch.inference_mode()
def check_steps(model: PreTrainedModel, device: str, embeddings: str) -> bool:
    """Whether several tokens may be fed to a cache that holds some; if not, one by one. Raises Unsupported."""
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.vocab_size, (HELD + FED,), generator=generator).to(device)

    def logits(*counts: int) -> torch.Tensor:
        runner = Runner(model, "dynamic", HELD + FED, device, embeddings)
        return torch.cat([runner.feed(part) for part in tokens.split(list(counts))])[HELD:].float()

    try:
        whole = logits(HELD + FED)
        deviation = whole.std()

        def error(*counts: int) -> float:
            return float((logits(HELD, *counts) - whole).square().mean().sqrt() / deviation)

        single, several = error(*[1] * FED), error(FED)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as problem:
        raise Unsupported(
            f"{text.model_type} cannot go on from a cache of ours: {str(problem).splitlines()[0]}"
        ) from None
    limit = ROUNDING.get(model.dtype, ROUNDING_HALF)
    if not single <= limit:
        raise Unsupported(
            f"{text.model_type} says something else step by step through its cache than in one pass: "
            f"logits differ by {single:.2g} of their deviation"
        )
    return several <= max(ROUNDING[torch.float32], APART * single)
