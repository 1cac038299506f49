"""The child's side of a measurement: requests in JSON on one pipe, events in JSON on another.

Standard output belongs to libraries, which print what they like; results travel on descriptors of their own. The order
within `start` matters: the cap is set before any weight is read. Every reply ends with an event `done` or `failed`;
`failed` carries an outcome and its reason, and `poisoned` where this process must not be used again. An exception that
our own code raises without meaning to is a bug: its traceback is sent, and the parent stops the run.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

_PACKAGE = str(Path(__file__).resolve().parents[1])


class Worker:
    """One process's state: its meter, its inputs and the load group that it holds."""

    def __init__(self, events: IO[str]):
        self._events = events
        self.engine: Any = None
        self.load_peaks: dict[str, int | None] = {}
        self.load_s = 0.0
        self.plain: dict[tuple[Any, ...], list[list[int]]] = {}  # greedy text without speculation

    def say(self, event: str, **data: Any) -> None:
        self._events.write(json.dumps({"event": event, **data}) + "\n")
        self._events.flush()

    def phase(self, text: str) -> None:
        self.say("phase", text=text)

    def preload(self) -> dict[str, Any]:
        """Import everything, so that libraries count as the process's own and not as one configuration's footprint.

        Without garbage collection, which would go through all that stays: 5.9 s instead of 6.9 (benchmarks/LOG.md).
        """
        self.phase("importing libraries")
        gc.disable()
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        import optimum.quanto  # noqa: F401
        import transformers

        from ..engine import decode  # noqa: F401
        from ..measure import machine, memory, quality, task, throughput  # noqa: F401

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        gc.freeze()
        gc.enable()
        return {}

    def start(self, device: str, budget_bytes: int | None) -> dict[str, Any]:
        import torch

        from ..measure.memory import Meter

        self.device = device
        if device != "cpu":
            self.phase("starting CUDA")
        self.meter = Meter(device, budget_bytes)
        uuid = "" if device == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
        return {"base_bytes": self.meter.base_bytes, "gpu_uuid": f"GPU-{uuid.removeprefix('GPU-')}" if uuid else None}

    def environment(self) -> dict[str, Any]:
        """What this machine is: for run.json and the policy."""
        import torch

        from ..measure.machine import bandwidth, describe

        return {**describe(self.device), "bandwidth_bytes_per_s": bandwidth(self.device), "torch": torch.__version__}

    def probe(self, words: dict[str, list[str]], model: str | None = None) -> dict[str, dict[str, str]]:
        """Which of the words this machine, or the model, cannot run, each with its reason."""
        from ..engine.load import lacks
        from ..measure.machine import probe

        attentions = {} if model is None else {word: lacks(model, word) for word in words.get("attention", [])}
        lacking = {word: reason for word, reason in attentions.items() if reason}
        left = {knob: [word for word in asked if word not in lacking] for knob, asked in words.items()}
        failed = probe(left, self.device, self.phase)
        return failed | ({"attention": failed.get("attention", {}) | lacking} if lacking else {})

    def inputs(self, **request: Any) -> dict[str, Any]:
        from ..measure.inputs import prepare

        self.phase("reading the text")
        return prepare(**request)

    def task(self, **request: Any) -> dict[str, Any]:
        from ..measure.task import prepare

        self.phase("reading the task")
        return prepare(**request)

    def load(self, model: str, group: dict[str, str]) -> dict[str, Any]:
        from ..config import LoadGroup
        from ..engine.decode import Engine
        from ..measure.memory import module_bytes

        began = time.perf_counter()
        self.engine = None
        self.plain.clear()
        self.meter.begin()
        self.engine = Engine.load(model, LoadGroup(**group), self.device, self.phase)
        self.load_s = time.perf_counter() - began
        self.load_peaks = self.meter.peaks()
        self.meter.begin()
        target = self.engine.target
        head, embedding = target.get_output_embeddings(), target.get_input_embeddings()
        shared = head is not None and getattr(head, "weight", None) is embedding.weight
        on_host = group["embeddings"] == "host" and self.device != "cpu"
        resident = 0 if on_host else module_bytes(embedding)
        draft = self.engine.draft
        beside = module_bytes(draft.get_input_embeddings()) if draft is not None and on_host else 0
        head_bytes = 0 if shared else module_bytes(head)
        self.owners = {
            "weights": module_bytes(target) - module_bytes(embedding) - head_bytes,
            "lm_head": head_bytes,
            "embeddings": resident,
            "draft": module_bytes(draft) - beside,
        }
        return {"load_s": self.load_s, "owners": self.owners, **self.load_peaks}

    def load_reference(self, model: str, weights: str) -> dict[str, Any]:
        """The unquantized model; or quantized checkpoint; where the device cannot hold the former, from host memory."""
        import torch

        from ..config import LoadGroup
        from ..engine.decode import Engine
        from ..engine.load import usual_attention

        self.phase("loading the reference")
        group = LoadGroup(weights=weights, attention=usual_attention(model))
        try:
            self.engine = Engine.load(model, group, self.device)
        except torch.OutOfMemoryError:
            if weights == "checkpoint":  # what is quantized already cannot be spread over the host
                raise
            self.engine = None
        if self.engine is not None:
            return {"how": "on the device"}
        from transformers import AutoModelForCausalLM

        torch.cuda.empty_cache()
        self.phase("loading the reference, partly in host memory")
        target = AutoModelForCausalLM.from_pretrained(
            model, device_map="auto", dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
        )
        self.engine = Engine(target.eval(), None, group, self.device)
        return {"how": "layer by layer from host memory"}

    def reference(self, inputs: str, context: int, path: str) -> dict[str, Any]:
        """Score this context's windows with what is loaded and keep the logits."""
        import numpy as np
        import torch

        from ..config import Configuration
        from ..measure.inputs import windows

        prompts, continuations = windows(inputs, context)
        self.phase(f"scoring the reference at {context} tokens")
        rows = torch.stack(
            [
                self._score(prompt, tokens, Configuration())
                for prompt, tokens in zip(prompts, continuations, strict=True)
            ]
        )
        kept = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows.float()
        np.save(path, kept.numpy())
        return {"dtype": str(rows.dtype)}

    def noise(self, inputs: str, context: int, reference: str) -> dict[str, float]:
        """What the reference loses against itself in eager attention, which computes the same in another order.

        `ln_ratio` is |ln(perplexity ratio)| at the farther end of its 95 % interval, because the mean of what has no
        sign may be near 0 by chance. Nothing where the model cannot change its attention, or has no room for this one.
        """
        from ..config import Configuration
        from ..measure.memory import out_of_memory

        self.phase(f"measuring the noise floor at {context} tokens")
        target = self.engine.target
        own = target.config._attn_implementation
        target.set_attn_implementation("eager")
        try:
            if target.config._attn_implementation == own:
                return {}
            # in chunks, for eager attention holds a number for every pair of tokens
            figures = self._quality(Configuration(prefill_chunk=512), inputs, context, reference)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return {}
        finally:
            target.set_attn_implementation(own)
        farther = max(abs(math.log(end)) for end in figures["perplexity_ratio_interval"])
        found = {"ln_ratio": farther, "kl_divergence": figures["kl_divergence"]}
        return found if math.isfinite(farther) else {}

    def reference_task(self, path: str) -> dict[str, Any]:
        """Answer the task's questions with what is loaded and keep the scores beside them."""
        from ..config import Configuration

        self.phase("answering the task with the reference")
        task = json.loads(Path(path).read_text())
        task["reference"] = self._scores(Configuration(), task)
        Path(path).write_text(json.dumps(task))
        return {}

    def _scores(self, configuration: Any, task: dict[str, Any]) -> list[tuple[float, float]]:
        """How good each answer is. Plain decoding answers: speculation and launch change no text (promise 3)."""
        from transformers import AutoTokenizer

        from ..measure.task import score

        # of this process, and so of the footprint: a deployment has one as well
        tokenizer = AutoTokenizer.from_pretrained(task["model"], local_files_only=True)
        plain = configuration.replace(draft="none", depth=0, launch="eager")
        pairs = zip(task["questions"], task["answers"], strict=True)
        return [score(self._answer(tokenizer, question, plain), expected) for question, expected in pairs]

    def _answer(self, tokenizer: Any, question: list[int], configuration: Any) -> str:
        """The first line of the greedy continuation."""
        from ..measure.task import ANSWER

        tokens: list[int] = []

        def text() -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

        self.engine.generate(
            question,
            configuration,
            ANSWER,
            stop=self.engine.stop_tokens,
            on_tokens=tokens.extend,
            ended=lambda: "\n" in text(),
        )
        return text().partition("\n")[0]

    def _score(self, prompt: list[int], continuation: list[int], configuration: Any) -> Any:
        from ..measure.quality import STEP

        return self.engine.score(prompt, continuation, configuration, STEP)

    def begin(self) -> dict[str, Any]:
        """Give back what the last measurement left, so that no witness counts it as the next one's.

        Its caches and recorded steps would else be held until the next request, and be in use when its peaks begin.
        """
        if self.engine is not None:
            self.engine.close()
        self.meter.begin()
        return {}

    def measure(
        self,
        configuration: dict[str, Any],
        context: int,
        new_tokens: int,
        inputs: str,
        reference: str | None,
        careful: bool,
        min_rounds: int,
        limit_s: float,
        bar: float | None,
        task: str | None = None,
    ) -> dict[str, Any]:
        """Everything that a record holds and this side can see."""
        from ..config import Configuration
        from ..measure.inputs import prompts_of
        from ..measure.machine import state, waiting
        from ..measure.task import figures as task_figures
        from ..measure.throughput import measure_throughput
        from ..samples import summarize

        began = time.perf_counter()
        chosen = Configuration(**configuration)
        prompts = prompts_of(inputs, context)
        before = state(self.device)
        self.begin()
        self.phase("timing")
        samples, generations = measure_throughput(
            self.engine,
            chosen,
            prompts,
            new_tokens,
            min_rounds=min_rounds,
            limit_s=limit_s,
            bar=bar,
            on_round=lambda rounds: self.phase(f"timing, round {rounds}"),
        )
        peaks = self.meter.peaks()
        figures: dict[str, Any] = summarize(samples)
        figures |= {key: max(value or 0, self.load_peaks[key] or 0) or None for key, value in peaks.items()}
        figures["memory"] = self._owners(peaks, generations[-1])
        after = state(self.device)
        figures["machine"] = {"before": before, "after": after, "waiting": waiting(before, after)}
        # a finalist's text is checked for every prompt, that of what cannot win for none
        checked = len(prompts) if careful else 0 if len(samples) == len(prompts) else 1
        texts = [generation.tokens for generation in generations]
        wrong = self._wrong_output(chosen, context, prompts[:checked], new_tokens, texts[:checked])
        if reference is not None:
            self.phase("measuring quality")
            figures |= self._quality(chosen, inputs, context, reference)
        if task is not None:
            self.phase("answering the task")
            asked = json.loads(Path(task).read_text())
            figures |= task_figures(self._scores(chosen, asked), asked["reference"])
        figures |= {"base_bytes": self.meter.base_bytes, "load_s": self.load_s, "samples": samples}
        figures["measure_s"] = time.perf_counter() - began
        return {**figures, "wrong_output": wrong}

    def _owners(self, peaks: dict[str, int | None], generation: Any) -> dict[str, int]:
        """The footprint at its peak, by owner; what is left is activations, and on a GPU the allocator's slack."""
        owners = {
            "base": self.meter.base_bytes,
            **self.owners,
            "kv_cache": generation.cache_bytes,
            "draft_kv_cache": generation.draft_cache_bytes,
        }
        peak, allocated, reserved = (
            peaks["peak_bytes"],
            peaks["peak_allocated_bytes"],
            peaks["peak_reserved_bytes"],
        )
        held = sum(owners.values())
        if allocated is not None and reserved is not None:
            owners["activations"] = max(0, allocated - (held - self.meter.base_bytes))
            owners["slack"] = reserved - allocated
            owners["base"] = (peak or 0) - reserved  # kernels that were loaded since the start count as well
        else:
            owners["activations"] = max(0, (peak or 0) - held)
        return owners

    def _quality(self, configuration: Any, inputs: str, context: int, reference: str) -> dict[str, Any]:
        import numpy as np
        import torch

        from ..measure.inputs import windows
        from ..measure.quality import compare

        stored = np.load(reference, mmap_mode="r")
        prompts, continuations = windows(inputs, context)
        own = [
            self._score(prompt, tokens, configuration) for prompt, tokens in zip(prompts, continuations, strict=True)
        ]
        theirs = [torch.from_numpy(np.array(rows)) for rows in stored]
        if stored.dtype == np.uint16:
            theirs = [rows.view(torch.bfloat16) for rows in theirs]
        return compare(own, theirs, continuations)

    def _wrong_output(
        self, configuration: Any, context: int, prompts: list[list[int]], new_tokens: int, texts: list[list[int]]
    ) -> str:
        """Why the text is not that of plain decoding with the same cache, or nothing (promise 3)."""
        plain = configuration.replace(draft="none", depth=0, launch="eager")
        key = (plain.cache, plain.prefill_chunk, context, new_tokens)
        if configuration == plain or (configuration.depth == 0 and configuration.launch == "eager"):
            self.plain[key] = texts
            return ""
        known = self.plain.setdefault(key, [])
        for prompt in prompts[len(known) :]:
            self.phase("checking the text")
            known.append(self.engine.generate(prompt, plain, new_tokens).tokens)
        for index, (text, expected) in enumerate(zip(texts, known, strict=False)):
            if text == expected:
                continue
            at = next((i for i, pair in enumerate(zip(text, expected, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                return f"prompt {index}: {len(text)} tokens instead of {len(expected)}"
            gap, tolerance = self._tie(prompts[index], expected[:at], plain, text[at], expected[at])
            if gap > tolerance:
                return (
                    f"prompt {index} differs from plain decoding at new token {at}: "
                    f"the two tokens' logits are {gap:.3g} apart, rounding explains {tolerance:.3g}"
                )
        return ""

    def _tie(self, prompt: list[int], text: list[int], plain: Any, ours: int, expected: int) -> tuple[float, float]:
        """How far apart the two tokens' logits are where the texts part, and what rounding explains."""
        import torch

        row = self.engine.score(prompt, [*text, expected], plain, 1)[-1]
        spacing = torch.finfo(row.dtype).eps * row.float().abs().max().item()
        return (row[expected].float() - row[ours].float()).item(), 8 * spacing


def serve(requests: IO[str], events: IO[str]) -> None:
    """Answer requests until the pipe closes."""
    worker = Worker(events)
    for line in requests:
        request = json.loads(line)
        try:
            worker.say("done", **getattr(worker, request.pop("op"))(**request))
        except Exception as error:  # noqa: BLE001 - told apart in _failure; what is no known failure is reported as a bug
            worker.say("failed", **_failure(error))


def _failure(error: Exception) -> dict[str, Any]:
    import torch

    from ..config import mib
    from ..engine.support import Unsupported
    from ..measure.inputs import UnusableText
    from ..measure.memory import out_of_memory

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, UnusableText):
        return {"outcome": "unsupported", "reason": reason, "poisoned": False}
    if isinstance(error.__cause__, torch.OutOfMemoryError):  # a step that could not be recorded for want of memory
        return {"outcome": "out_of_memory", "reason": reason, "poisoned": True}
    if isinstance(error, Unsupported):
        return {"outcome": "unsupported", "reason": reason, "poisoned": bool(getattr(error, "poisons", False))}
    if out_of_memory(error):
        # CUDA's message goes on with advice about the whole device, which is not what is short here; the host
        # allocator's begins with the line of its source that failed
        asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
        reason = f"no room for {mib(int(asked[1]))} more" if asked else reason.partition(" GPU 0 ")[0]
        return {"outcome": "out_of_memory", "reason": reason, "poisoned": False}
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if raised_in.startswith(_PACKAGE) and not isinstance(error, OSError):
        return {"outcome": "bug", "reason": reason, "trace": trace, "poisoned": True}
    return {"outcome": "crashed", "reason": f"{type(error).__name__}: {reason}", "trace": trace, "poisoned": True}


def main() -> None:
    incoming, outgoing = (int(fd) for fd in sys.argv[1:3])
    if platform.system() == "Linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the parent
    with os.fdopen(incoming, "r") as requests, os.fdopen(outgoing, "w") as events:
        serve(requests, events)


if __name__ == "__main__":
    main()
