"""Runs where lm-evaluation-harness is installed: prints the rolling log-likelihood of a text as one line of JSON.

Plain forward passes over windows of the text: every token is predicted once, from the tokens before it in its window.
No cache is read, so what crosscheck.py finds through a cache has to come to the same sum, but for rounding.
"""

from __future__ import annotations

import argparse
import json
import os

EXAMPLE = '{"model": "DIR", "device": "cpu", "dtype": "float32", "threads": 2, "window": 512, "text": "FILE"}'
parser = argparse.ArgumentParser(description=__doc__, epilog=f"Example: python lm_eval_peer.py '{EXAMPLE}'")
parser.add_argument("asked", type=json.loads, help="a JSON object; threads 0: as torch chooses")
asked = parser.parse_args().asked

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


def main() -> None:
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
