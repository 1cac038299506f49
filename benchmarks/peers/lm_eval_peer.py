"""Runs where lm-evaluation-harness is installed: prints the rolling log-likelihood of a text as one line of JSON."""

from __future__ import annotations

import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


def main() -> None:
    asked = json.loads(sys.argv[1])
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    model = HFLM(
        pretrained=asked["model"],
        dtype=asked["dtype"],
        softmax_dtype="float32",  # its default takes the logarithm in the model's own precision
        device=asked["device"],
        max_length=asked["window"],
        batch_size=1,
        attn_implementation="sdpa",
    )
    with open(asked["text"], encoding="utf-8") as file:
        text = file.read()
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (likelihood,) = model.loglikelihood_rolling([request], disable_tqdm=True)
    answer = {"loglikelihood": likelihood, "tokens": model.tok_encode(text), "prefix": model.prefix_token_id}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
