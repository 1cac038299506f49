"""Runs where optimum-benchmark is installed: one process, one model, stock `generate`, measured by them and by us.

Stock `generate` at batch 1: its prefill is compute-bound, its decode reads every weight once a token, and the host's
launches cost it what is left. Both instruments time that same loop, so that only the instruments can differ.

Reads a word a line and answers each with a line of JSON: `theirs` is one session of optimum-benchmark's own tracker,
`ours` is autotune.measure.throughput over the same model object, inputs and number of generations, `memory` is one run
of its memory tracker, which the caller's witness watches from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

EXAMPLE = (
    '{"model": "DIR", "device": "cpu", "dtype": "float32", "threads": 2, "context": 512, "new_tokens": 64, '
    '"generations": 2}'
)
parser = argparse.ArgumentParser(description=__doc__, epilog=f"Example: python optimum_benchmark_peer.py '{EXAMPLE}'")
parser.add_argument("asked", type=json.loads, help="a JSON object; threads 0: as torch chooses")
asked = parser.parse_args().asked

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

import torch  # noqa: E402
import transformers  # noqa: E402
from optimum_benchmark import InferenceConfig, PyTorchConfig  # noqa: E402
from optimum_benchmark.backends.pytorch.backend import PyTorchBackend  # noqa: E402
from optimum_benchmark.scenarios.inference.scenario import InferenceScenario  # noqa: E402

from autotune.config import Configuration  # noqa: E402
from autotune.measure.throughput import measure_throughput, summarize  # noqa: E402


class _Clock:
    """A streamer for `generate` that notes when each token reached the host; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Stock:
    """Stock `generate`, as an engine that measure_throughput can time."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]):
        self.model, self.inputs, self.options, self.device = model, inputs, options, str(model.device)

    @torch.inference_mode()
    def generate(self, prompt: list[int], configuration: Configuration, new_tokens: int) -> Any:
        clock = _Clock()
        options = {**self.options, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "streamer": clock}
        began = time.perf_counter()
        tokens = self.model.generate(**self.inputs, **options)[0, len(prompt) :].tolist()
        first, *later = clock.times[1:]
        steps = [after - before for before, after in zip([first, *later], later, strict=False)]
        counts = dict.fromkeys(("proposed", "accepted", "verifications"), 0)
        return SimpleNamespace(
            tokens=tokens, ttft_s=first - began, step_s=steps, step_tokens=[1] * len(steps), **counts
        )


def main() -> None:
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    backend = PyTorchBackend(
        PyTorchConfig(
            model=asked["model"],
            library="transformers",
            task="text-generation",
            device=asked["device"],
            device_ids="0" if asked["device"] == "cuda" else None,
            torch_dtype=asked["dtype"],
            attn_implementation="sdpa",
        )
    )
    length = {"max_new_tokens": asked["new_tokens"], "min_new_tokens": asked["new_tokens"]}
    scenario = InferenceScenario(
        InferenceConfig(
            iterations=asked["generations"],
            duration=0,
            warmup_runs=1,
            input_shapes={"batch_size": 1, "sequence_length": asked["context"]},
            generate_kwargs=length,
            latency=True,
            memory=True,
        )
    )
    scenario.run(backend)
    options = {key: value for key, value in scenario.config.generate_kwargs.items() if key != "logits_processor"}
    stock = Stock(backend.pretrained_model, dict(scenario.inputs), options)
    prompt = scenario.inputs["input_ids"][0].tolist()

    def theirs() -> dict[str, Any]:
        scenario.run_per_token_text_generation_latency_tracking()
        prefill, decode = scenario.report.prefill.latency, scenario.report.decode.latency
        return {
            "tokens_per_s": asked["new_tokens"] / (prefill.mean + decode.mean),
            "decode_tokens_per_s": scenario.report.decode.throughput.value,
            "ttft_s": prefill.mean,
        }

    def ours() -> dict[str, Any]:
        rounds = {"min_rounds": asked["generations"], "limit_s": 0.0}
        samples, _ = measure_throughput(stock, Configuration(), [prompt], asked["new_tokens"], **rounds)
        figures = summarize(samples)
        return {name: figures[name] for name in ("tokens_per_s", "decode_tokens_per_s", "ttft_s")}

    def memory() -> dict[str, Any]:
        scenario.run_text_generation_memory_tracking()
        seen = scenario.report.prefill.memory, scenario.report.decode.memory
        names = ("max_ram", "max_process_vram", "max_allocated", "max_reserved")
        return {name: max(getattr(part, name) or 0 for part in seen) * 1e6 for name in names}

    words = {"theirs": theirs, "ours": ours, "memory": memory}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    say({"threads": torch.get_num_threads(), **versions})
    for line in sys.stdin:
        say(words[line.strip()]())


def say(answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
