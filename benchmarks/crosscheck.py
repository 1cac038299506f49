"""Our figures beside those of tools that we did not write: optimum-benchmark, lm-evaluation-harness, stock `generate`.

What each one measures decides what may be compared:

- optimum-benchmark times stock `generate` on random tokens at batch 1: its prefill ends when the first logits are
  there, its decode throughput is the new tokens after the first over the time that they take. So our instrument
  (measure/throughput.py) times the same loop on the same model object in the same process, turn by turn, and has to
  agree. Our engine's rate is shown beside that without a bar: it is another loop, which spares stock's bookkeeping.
- Its memory is the process's largest resident set, sampled at 100 Hz, on a GPU also what NVML and the allocator say.
  Our witness watches the same process at the same time and has to agree; on a GPU the engine's peak allocation has to
  agree too. On a CPU the engine's own footprint is not compared: the two processes hold different libraries.
- lm-evaluation-harness sums log-likelihoods over rolling windows in plain forward passes. Ours are of the same windows
  through the dynamic cache, a prefix prefilled and the rest scored in steps.
- Stock `generate` is compared token for token, where a difference counts unless both tokens' logits are as good as
  equal in the model's precision.

Each peer lives in a virtual environment of its own, with the versions of peers/*.txt, so that its pins touch nothing
of ours; torch is the version that is installed here. With --peers, wheels come from a folder and not from an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.config import Budget, Configuration, LoadGroup, Workload, parse_tokens
from autotune.demo import held_out_text
from autotune.engine.decode import Engine
from autotune.engine.support import full_precision
from autotune.measure.quality import STEP
from autotune.trial.witness import Witness
from benchmarks.prepare import UNLIMITED, device_option, draft_option, model_option, pair_of, unscored

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "autotune" / "peers"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
GENERATIONS = 2  # a turn of each instrument: short, since what else the machine does changes by the second
BARS = {"throughput": 0.05, "memory": 0.02, "perplexity": 0.001}  # share of theirs that ours may be off: set by us


class NotComparable(Exception):
    """Why a peer could not be asked."""


@dataclass(frozen=True)
class Setting:
    """What both sides are given."""

    model: Path
    draft: Path | None
    device: str
    precision: str  # bf16 or fp32
    context: int
    new_tokens: int
    threads: int
    rounds: int


Row = dict[str, Any]


def row(name: str, ours: float, theirs: float, bar: float | None) -> Row:
    ratio = ours / theirs
    return {
        "name": name,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "bar": bar,
        "holds": bar is None or abs(ratio - 1) <= bar,
    }


def peer_python(name: str, cache: Path, wheels: Path | None) -> Path:
    """The interpreter of the peer's environment, which is made where it is missing. Raises NotComparable."""
    pins = HERE / "peers" / f"{name}.txt"
    torch_pin = f"torch=={version('torch').partition('+')[0]}"
    named = hashlib.sha256((pins.read_text() + torch_pin + str(wheels)).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{named}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    click.echo(f"installing {name} into {folder}", err=True)
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        lines = [line for line in pins.read_text().splitlines() if not line.startswith("torch==")]
        constraints.write("\n".join([*lines, torch_pin]) if wheels is None else torch_pin)
        constraints.flush()
        asked = [
            line for line in lines if line.startswith((f"{name}==", f"{name.replace('-', '_')}==", "transformers=="))
        ]
        make = [sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] if wheels else []), str(folder)]
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            *source,
            "-c",
            constraints.name,
            "torch",
            "accelerate",
            *asked,
        ]
        for command in (make, install):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
                raise NotComparable(f"{name} is not installed: {said[0][:200]}")
    (folder / "complete").touch()
    return python


@contextmanager
def peer(
    script: str, python: Path, asked: dict[str, Any], log: Path
) -> Iterator[tuple[Callable[[str], Row], int, Row]]:
    """Starts a peer's script; gives a way to ask it a word, its process number and its first answer."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LOG_TO_FILE": "0"}
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *([inherited] if inherited else [])])
    command = [str(python), str(HERE / "peers" / script), json.dumps(asked)]
    with (
        log.open("w") as sink,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env=environment,
            cwd=log.parent,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def answer(word: str = "") -> Row:
            assert process.stdin is not None
            assert process.stdout is not None
            if word:
                process.stdin.write(word + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                lines = log.read_text().strip().splitlines() or ["it said nothing"]
                raise NotComparable(f"{script} ended: {lines[-1][:200]}")
            return json.loads(line)  # type: ignore[no-any-return]

        try:
            yield answer, process.pid, answer()
        finally:
            process.kill()


def speed_and_memory(s: Setting, python: Path, folder: Path) -> Iterator[Row]:
    """optimum-benchmark, our instrument on the same loop, and our engine, in turn."""
    asked = {
        "model": str(s.model.resolve()),
        "device": s.device.partition(":")[0],
        "dtype": DTYPES[s.precision],
        "threads": s.threads,
        "new_tokens": s.new_tokens,
        "context": s.context,
        "generations": GENERATIONS,
    }
    stock = Configuration(weights=s.precision, lm_head=s.precision)
    workload = Workload((s.context,), new_tokens=s.new_tokens)
    seen: dict[str, list[Row]] = {"theirs": [], "ours": [], "engine": []}
    with (
        unscored(s.model, workload, Budget(UNLIMITED, s.device), folder) as (trials, _),
        peer("optimum_benchmark_peer.py", python, asked, folder / "peer.log") as (ask, pid, hello),
    ):
        click.echo(f"optimum-benchmark runs transformers {hello['transformers']}, {hello['threads']} threads", err=True)
        for number in range(s.rounds):
            for word in ("theirs", "ours") if number % 2 == 0 else ("ours", "theirs"):
                seen[word].append(ask(word))
            record = trials.measure(stock, s.context)
            if record.tokens_per_s is None:
                raise NotComparable(f"our engine: {record.outcome}: {record.reason}")
            seen["engine"].append(record.to_json())
        uuid = trials._worker.hello["gpu_uuid"] if trials._worker is not None else None
        witness = Witness(pid, uuid)
        witness.start()
        theirs = ask("memory")
        witness.stop()
    for name in ("decode_tokens_per_s", "tokens_per_s", "ttft_s"):
        medians = {side: statistics.median(row[name] for row in rows) for side, rows in seen.items()}
        ratio = statistics.median(
            mine[name] / their[name] for mine, their in zip(seen["ours"], seen["theirs"], strict=True)
        )
        # paired turn by turn: what the machine did meanwhile falls out
        bar = BARS["throughput"] if name != "ttft_s" else None
        yield row(f"stock generate, {name}", ratio * medians["theirs"], medians["theirs"], bar)
        yield row(f"engine beside stock generate, {name}", medians["engine"], medians["theirs"], None)
    watched = theirs["max_ram"] if uuid is None else theirs["max_process_vram"]
    if not watched:
        raise NotComparable("NVML does not tell optimum-benchmark's process from others here")
    yield row(f"witness of the same process ({witness.instrument})", witness.peak, watched, BARS["memory"])
    if theirs["max_allocated"]:
        allocated = max(engine["peak_allocated_bytes"] for engine in seen["engine"])
        yield row("engine, peak allocated", allocated, theirs["max_allocated"], BARS["memory"])


def perplexity(s: Setting, python: Path, folder: Path, precision: str) -> Iterator[Row]:
    """Rolling log-likelihood of the same text in the same windows; ours goes through the dynamic cache."""
    text = folder / "rolling.txt"
    tokenizer = AutoTokenizer.from_pretrained(s.model)
    text.write_text(tokenizer.decode(tokenizer((folder / "text.txt").read_text())["input_ids"][: 6 * s.context]))
    asked = {"model": str(s.model.resolve()), "device": s.device, "dtype": DTYPES[precision], "threads": s.threads}
    with peer("lm_eval_peer.py", python, {**asked, "window": s.context, "text": str(text)}, folder / "peer.log") as (
        _,
        _,
        theirs,
    ):
        pass
    configuration = Configuration(weights=precision, lm_head=precision)
    engine = Engine.load(str(s.model), configuration.load_group, s.device)
    ours = 0.0
    for prompt, continuation in rolling(theirs["tokens"], theirs["prefix"], s.context):
        logits = engine.score(prompt, continuation, configuration, STEP).float().log_softmax(-1)
        ours += logits.gather(1, torch.tensor(continuation)[:, None]).double().sum().item()
    count = len(theirs["tokens"])
    figures = [
        float(torch.tensor(-total / count, dtype=torch.float64).exp()) for total in (ours, theirs["loglikelihood"])
    ]
    yield row(f"rolling perplexity, {precision}", *figures, BARS["perplexity"])


def rolling(tokens: list[int], prefix: int, window: int) -> Iterator[tuple[list[int], list[int]]]:
    """The harness's windows: what is given and what is scored. The first begins after `prefix`, the last looks back."""
    given = [prefix, *tokens]
    for begin in range(0, len(tokens), window):
        end = min(begin + window, len(tokens))
        yield given[max(0, end - window) : begin + 1], tokens[begin:end]


def text_for_text(s: Setting, folder: Path, precision: str) -> Iterator[Row]:
    """Every way of decoding that keeps the full-precision cache, against stock `generate` of another copy."""
    plain = Configuration(weights=precision, lm_head=precision)
    drafted = plain.replace(draft=str(s.draft), depth=4) if s.draft else plain
    ways = {
        "dynamic cache": plain,
        "static cache": plain.replace(cache="static"),
        "chunked prefill": plain.replace(prefill_chunk=200),
        "prompt lookup": plain.replace(draft="prompt-lookup", depth=4),
    } | ({"draft model": drafted} if s.draft else {})
    ids = AutoTokenizer.from_pretrained(s.model)((folder / "text.txt").read_text())["input_ids"]
    starts = [len(ids) // 3, 2 * len(ids) // 3]
    prompts = [ids[start : start + s.context] for start in starts]
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=getattr(torch, DTYPES[precision])).to(s.device).eval()
    model.generation_config.eos_token_id = None
    stock = [stock_text(model, prompt, s.new_tokens) for prompt in prompts]
    del model
    group = LoadGroup(**{**vars(drafted.load_group)})
    engine = Engine.load(str(s.model), group, s.device)
    for name, configuration in ways.items():
        same = parted = 0
        for prompt, expected in zip(prompts, stock, strict=True):
            text = engine.generate(prompt, configuration, s.new_tokens).tokens
            at = next((i for i, pair in enumerate(zip(text, expected, strict=True)) if pair[0] != pair[1]), None)
            same += s.new_tokens if at is None or is_tie(engine, prompt, text, expected, at, plain) else at
            parted += at is not None
        name = f"stock generate's tokens, {precision}, {name}" + (f" ({parted} parted at a tie)" if parted else "")
        yield row(name, same, s.new_tokens * len(prompts), 0.0)


def stock_text(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def is_tie(
    engine: Engine, prompt: list[int], text: list[int], expected: list[int], at: int, plain: Configuration
) -> bool:
    """Whether two tokens at which texts part have logits as equal as the precision can tell."""
    logits = engine.score(prompt, expected[: at + 1], plain, 1)[-1]
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.float().abs().max().item()
    return abs(float(logits[text[at]]) - float(logits[expected[at]])) <= rounding


@click.command()
@model_option
@draft_option
@device_option
@click.option("--context", default="512", show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--rounds", default=11, show_default=True, help="turns of each instrument")
@click.option(
    "--peers", type=click.Path(path_type=Path, exists=True), help="a folder of wheels, where there is no index"
)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
def main(
    model: Path | None,
    draft: Path | None,
    device: str,
    context: str,
    new_tokens: int,
    rounds: int,
    peers: Path | None,
    cache: Path,
) -> None:
    """Compare with three peers; the last line is one JSON object of ratios. Exit code 1 where a bar is missed.

    Example: python -m benchmarks.crosscheck --context 512
    """
    model, draft = pair_of(model, draft)
    threads = max(1, len(os.sched_getaffinity(0)) - 1) if device == "cpu" else 0  # as the worker sets it
    if threads:
        torch.set_num_threads(threads)
    precision = full_precision(device)
    setting = Setting(model, draft, device, precision, parse_tokens(context), new_tokens, threads, rounds)
    rows: list[Row] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text(held_out_text(), encoding="utf-8")
        parts: list[Callable[[], Iterator[Row]]] = [
            *(lambda p=p: text_for_text(setting, folder, p) for p in dict.fromkeys(("fp32", precision))),
            *(
                lambda p=p: perplexity(setting, peer_python("lm-eval", cache, peers), folder, p)
                for p in dict.fromkeys(("fp32", precision))
            ),
            lambda: speed_and_memory(setting, peer_python("optimum-benchmark", cache, peers), folder),
        ]
        click.echo(f"{'':<66}{'ours':>16}{'theirs':>16}{'ratio':>9}  bar")
        for part in parts:
            try:
                for found in part():
                    rows.append(found)
                    click.echo(line_of(found))
            except (NotComparable, torch.OutOfMemoryError) as error:
                left_out.append(str(error).splitlines()[0])
                click.echo(f"not compared: {left_out[-1]}")
    holds = all(found["holds"] for found in rows)
    figures = {"benchmark": "crosscheck", "device": device, "precision": precision, "holds": holds}
    ratios = {found["name"]: round(found["ratio"], 5) for found in rows}
    click.echo(json.dumps({**figures, "ratios": ratios, "not_compared": left_out}))
    sys.exit(not holds)


def line_of(found: Row) -> str:
    bar = "" if found["bar"] is None else f"{found['bar']:.1%} {'held' if found['holds'] else 'MISSED'}"
    return f"{found['name']:<66}{found['ours']:>16,.4f}{found['theirs']:>16,.4f}{found['ratio']:>9.4f}  {bar}"


if __name__ == "__main__":
    main()
