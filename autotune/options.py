"""The options of run and plan: how each is read, and the checked request that they make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .config import OBJECTIVES, TASK_QUESTIONS, Budget, Workload, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from .request import Request


class Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Contexts(click.ParamType[tuple[int, ...]]):
    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({parse_tokens(part) for part in value.split(",")}))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Mix(click.ParamType[dict[int, float]]):
    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, float]:
        if isinstance(value, dict):
            return value
        shares: dict[int, float] = {}
        for part in value.split(","):
            length, _, share = part.partition(":")
            if not re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*", share) or not 0 < float(share) < float("inf"):
                self.fail(f"'{part}' is not a length with its share; write it like 512:0.7,4k:0.3", param, ctx)
            try:
                tokens = parse_tokens(length)
            except ValueError as error:
                self.fail(str(error), param, ctx)
            if tokens in shares:
                self.fail(f"{length} is there twice", param, ctx)
            shares[tokens] = float(share)
        total = sum(shares.values())
        return {length: shares[length] / total for length in sorted(shares)}


class Tokens(click.ParamType[int]):
    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType[float]):
    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", value)
        if not match:
            self.fail(f"'{value}' is not a share; write it like 5% or 0.05", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class Duration(click.ParamType[float]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", value)
        if not match or float(match[1]) == 0:
            self.fail(f"'{value}' is not a time; write it like 90s, 30m or 2h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `run` and `plan` share."""
    options = [
        click.option("--model", metavar="ID|DIR", help="Model folder or Hugging Face ID. Default: the bundled pair."),
        click.option("--draft", "drafts", multiple=True, metavar="ID|DIR", help="A draft model; may be repeated."),
        click.option("--budget", type=Size(), required=True, help="The most memory that the process may hold: 6.5GB."),
        click.option("--contexts", type=Contexts(), help="Prompt lengths. Default: those of --mix, else 512,2k,4k."),
        click.option("--mix", type=Mix(), help="Each length's share of the requests: 512:0.7,4k:0.3."),
        click.option("--reloads", is_flag=True, help="Let each context load weights of its own where that is faster."),
        click.option("--new-tokens", type=Tokens(), default="128", show_default=True, help="Generated per request."),
        click.option("--space", default="default", show_default=True, metavar="NAME|FILE", help="The search space."),
        click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text that quality is measured on."),
        click.option("--prompts", type=click.Path(path_type=Path), help='JSON Lines file with a "prompt" a line.'),
        click.option("--max-quality-loss", type=Share(), default="5%", show_default=True, help="In perplexity."),
        click.option(
            "--task",
            type=click.Path(path_type=Path),
            help='JSON Lines file with a "question", which is the prompt as it stands, and an "answer" a line, which '
            f"greedy answers are compared with, up to a line break; the first {TASK_QUESTIONS} are asked.",
        ),
        click.option(
            "--max-task-loss",
            type=Share(),
            default="5%",
            show_default=True,
            help="Of --task: points of F1 below the unquantized model's own answers. Within error is no loss.",
        ),
        click.option("--objective", type=click.Choice(OBJECTIVES), default="end-to-end", show_default=True),
        click.option("--trials", type=click.IntRange(min=1), help="Stop after this many measurements."),
        click.option("--timeout", type=Duration(), default="13m", show_default=True, help="Time for the whole run."),
        click.option("--device", metavar="cuda:N|cpu", help="Default: the first GPU, else the CPU."),
        click.option("--storage", metavar="URL", help="Any URL that Optuna takes. Default: study.db in the folder."),
        click.option("--out", type=click.Path(path_type=Path), help="Run folder. Default: results/MODEL-BUDGET."),
        click.option("--seed", type=int, default=0, show_default=True),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def request_of(options: dict[str, Any]) -> Request:
    """The options as a checked request."""
    from .model.folder import PlanError
    from .request import Request
    from .search.space import SpaceError, read_space

    device = _device(options["device"])
    drafts = list(options["drafts"])
    if options["model"] is None:
        from .demo import DRAFT, TARGET

        model, drafts = TARGET, [str(DRAFT), *drafts]
    else:
        model = _folder("--model", options["model"])
    text = options["text"]
    if text is not None:
        _check_text(text)
    prompts = options["prompts"]
    if prompts is not None:
        _check_lines("--prompts", prompts, "prompt")
    task = options["task"]
    if task is not None:
        _check_lines("--task", task, "question", "answer")
    mix = options["mix"] or {}
    contexts = options["contexts"] or tuple(mix) or Workload.contexts
    if mix and tuple(mix) != contexts:
        raise click.UsageError("--mix and --contexts name different lengths: leave out --contexts, or give the same")
    if options["objective"] == "decode" and options["new_tokens"] < 2:
        raise click.UsageError("--objective decode needs --new-tokens 2 or more: the first token comes of the prefill")
    workload = Workload(
        contexts=contexts,
        mix=tuple(mix.values()),
        new_tokens=options["new_tokens"],
        objective=options["objective"],
        max_quality_loss=options["max_quality_loss"],
        text=str(text) if text else None,
        prompts=str(prompts) if prompts else None,
        task=str(task) if task else None,
        max_task_loss=options["max_task_loss"],
    )
    try:
        space = read_space(options["space"])
    except SpaceError as error:
        raise click.UsageError(f"--space: {error}") from None
    try:
        return Request(
            model=model,
            drafts=[_folder("--draft", draft) for draft in drafts],
            budget=Budget(options["budget"], device),
            workload=workload,
            space=space,
            space_name=options["space"],
            out=options["out"],
            timeout_s=options["timeout"],
            trials=options["trials"],
            storage=options["storage"],
            reloads=options["reloads"],
            seed=options["seed"],
            warm_start=options.get("warm_start", False),
        )
    except PlanError as error:
        raise click.UsageError(str(error)) from None


def _folder(flag: str, name: str) -> Path:
    """A model folder: given, or a Hugging Face ID from the cache or the hub."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise click.UsageError(f"{flag} {name}: there is no such folder; give a model folder or an ID like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.UsageError(f"{flag} {name}: no such folder, and the hub does not give it: {reason}") from None


def _device(asked: str | None) -> str:
    count = _gpus()
    if asked is None:
        return "cuda:0" if count else "cpu"
    if asked == "cpu":
        return asked
    match = re.fullmatch(r"cuda(?::(\d+))?", asked)
    if not match:
        raise click.UsageError(f"--device {asked}: write cpu, cuda or cuda:N")
    number = int(match[1] or 0)
    if number >= count:
        raise click.UsageError(f"--device {asked}: this machine has {count} NVIDIA GPUs; use --device cpu")
    return f"cuda:{number}"


def _gpus() -> int:
    """How many NVIDIA GPUs there are, without starting CUDA."""
    import pynvml

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def _check_text(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--text {path} is not UTF-8 text; give a plain text file") from None
    if not text.strip() or "\0" in text:
        raise click.UsageError(f"--text {path} is {'empty' if not text.strip() else 'binary'}; give a plain text file")


def _check_lines(flag: str, path: Path, *keys: str) -> None:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{flag} {path} cannot be read: {error}") from None
    form = ", ".join(f'"{key}": "text"' for key in keys)
    for number, line in enumerate(lines, 1):
        try:
            texts = [json.loads(line)[key] for key in keys]
        except (ValueError, KeyError, TypeError):
            texts = [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise click.UsageError(f"{flag} {path}, line {number}: write {{{form}}}, one object a line")
    if not lines:
        raise click.UsageError(f"{flag} {path} is empty")
