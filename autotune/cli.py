"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .config import OBJECTIVES, TASK_QUESTIONS, Budget, Workload, mib, parse_bytes, parse_tokens, within_noise

if TYPE_CHECKING:
    from .policy.policy import Policy
    from .request import Request

WRITTEN = "policy.json, report.html, trials.csv"
EXAMPLES = {
    "run": "autotune run --model ./Llama-3-8B --draft ./Llama-3.2-1B --budget 6.5GB --contexts 512,2k,4k",
    "plan": "autotune plan --model ./Llama-3-8B --budget 6.5GB --contexts 2k,16k",
    "report": "autotune report results/demo-6199MiB",
    "export": "autotune export results/demo-6199MiB --to policy.json",
    "verify": "autotune verify results/demo-6199MiB/policy.json",
    "generate": 'autotune generate results/demo-6199MiB/policy.json --prompt "def main():"',
    "serve": "autotune serve results/demo-6199MiB/policy.json --port 8000",
}


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Contexts(click.ParamType[tuple[int, ...]]):
    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({parse_tokens(part) for part in value.split(",")}))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Mix(click.ParamType[dict[int, float]]):
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


class _Tokens(click.ParamType[int]):
    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Share(click.ParamType[float]):
    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", value)
        if not match:
            self.fail(f"'{value}' is not a share; write it like 5% or 0.05", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class _Duration(click.ParamType[float]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", value)
        if not match or float(match[1]) == 0:
            self.fail(f"'{value}' is not a time; write it like 90s, 30m or 2h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _inputs(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `run` and `plan` share."""
    options = [
        click.option("--model", metavar="ID|DIR", help="Model folder or Hugging Face ID. Default: the bundled pair."),
        click.option("--draft", "drafts", multiple=True, metavar="ID|DIR", help="A draft model; may be repeated."),
        click.option("--budget", type=_Size(), required=True, help="The most memory that the process may hold: 6.5GB."),
        click.option("--contexts", type=_Contexts(), help="Prompt lengths. Default: those of --mix, else 512,2k,4k."),
        click.option("--mix", type=_Mix(), help="Each length's share of the requests: 512:0.7,4k:0.3."),
        click.option("--reloads", is_flag=True, help="Let each context load weights of its own where that is faster."),
        click.option("--new-tokens", type=_Tokens(), default="128", show_default=True, help="Generated per request."),
        click.option("--space", default="default", show_default=True, metavar="NAME|FILE", help="The search space."),
        click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text that quality is measured on."),
        click.option("--prompts", type=click.Path(path_type=Path), help='JSON Lines file with a "prompt" a line.'),
        click.option("--max-quality-loss", type=_Share(), default="5%", show_default=True, help="In perplexity."),
        click.option(
            "--task",
            type=click.Path(path_type=Path),
            help='JSON Lines file with a "question", which is the prompt as it stands, and an "answer" a line, which '
            f"greedy answers are compared with, up to a line break; the first {TASK_QUESTIONS} are asked.",
        ),
        click.option(
            "--max-task-loss",
            type=_Share(),
            default="5%",
            show_default=True,
            help="Of --task: points of F1 below the unquantized model's own answers. Within error is no loss.",
        ),
        click.option("--objective", type=click.Choice(OBJECTIVES), default="end-to-end", show_default=True),
        click.option("--trials", type=click.IntRange(min=1), help="Stop after this many measurements."),
        click.option("--timeout", type=_Duration(), default="13m", show_default=True, help="Time for the whole run."),
        click.option("--device", metavar="cuda:N|cpu", help="Default: the first GPU, else the CPU."),
        click.option("--storage", metavar="URL", help="Any URL that Optuna takes. Default: study.db in the folder."),
        click.option("--out", type=click.Path(path_type=Path), help="Run folder. Default: results/MODEL-BUDGET."),
        click.option("--seed", type=int, default=0, show_default=True),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Run any Hugging Face model as fast as it can go inside a hard VRAM budget.

    \b
    Example: autotune run --budget 6.5GB
    """


def _command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    return main.command(name, epilog=f"\b\nExample:\n  {EXAMPLES[name]}")


@_command("run")
@_inputs
@click.option(
    "--warm-start/--no-warm-start",
    default=True,
    show_default=True,
    help="Begin with what finished runs beside --out, of this model or one like it, let expect.",
)
def run(**options: Any) -> None:
    """Search, measure, and write a policy with its report. The same command again continues.

    Ctrl-C, or SIGTERM, ends it with the best so far.
    """
    from rich.console import Console

    from .report.progress import Display
    from .run import tune

    request = _request(options)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    budget = request.budget
    console.print(
        f"{request.model.name} on {budget.device}, budget {mib(budget.bytes)}, into {request.out}", markup=False
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how Docker, Slurm and kill ask for an end
    with _plain_errors(), Display(console, request.workload.objective, request.timeout_s) as display:
        policy = tune(request, display)
    if policy is None:
        raise _answer_is_no(_nothing_feasible(request.out))
    _print_policy(policy, console)
    console.print(f"\n{request.out}/{WRITTEN}", markup=False)


def _nothing_feasible(folder: Path, so_far: str = "") -> str:
    return f"no configuration was feasible{so_far}; {folder}/report.html says why each was not"


@_command("plan")
@_inputs
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--by-layer", is_flag=True, help="List the weights' and the cache's bytes per layer.")
def plan(as_json: bool, by_layer: bool, **options: Any) -> None:
    """Predict the footprint of every configuration and context; measures nothing."""
    from .report.plan_table import print_layers, print_plan

    request = _request(options)
    with _plain_errors():
        (print_layers if by_layer else print_plan)(request, as_json)


@_command("report")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write report.html, trials.csv and policy.json again from what is stored.

    Of a run that was killed, or that goes on beside this, they tell the best so far.
    """
    from .results import has_ended, read_info
    from .run import conclude

    with _plain_errors():
        policy = conclude(folder)
        ended = has_ended(read_info(folder))
    if policy is None:
        click.echo(_nothing_feasible(folder, "" if ended else " so far"))
        return
    click.echo(f"{folder}/{WRITTEN}{'' if ended else ': the best so far of a run that has not ended'}")


@_command("export")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="File to write. Default: standard output.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["policy", "transformers", "markdown", "csv"]),
    default="policy",
    show_default=True,
    help="The policy; a Python file for stock transformers; a table for a README; every trial.",
)
def export(folder: Path, to: Path | None, kind: str) -> None:
    """Write a run's policy or its trials elsewhere. RUN is a run folder, or (except for csv) a policy.json."""
    with _plain_errors():
        text = _exported(folder, kind)
        if to is None:
            click.echo(text, nl=False)
            return
        try:
            to.write_text(text, encoding="utf-8")
        except OSError as error:
            raise click.UsageError(f"--to {to} cannot be written: {error.strerror}") from None


def _exported(folder: Path, kind: str) -> str:
    from .policy.export import as_markdown, as_transformers
    from .policy.policy import Policy
    from .results import frame, read_run
    from .run import conclude

    if kind == "csv":
        return frame(read_run(folder).records).to_csv(index=False)
    policy = Policy.load(folder) if folder.suffix == ".json" else conclude(folder)
    if policy is None:
        raise _answer_is_no(f"{folder} has no policy: no configuration was feasible")
    match kind:
        case "transformers":
            return as_transformers(policy)
        case "markdown":
            return as_markdown(policy)
    return json.dumps(policy.model_dump(mode="json"), indent=2) + "\n"


@_command("verify")
@click.argument("policy", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, with --watch one a line.")
@click.option("--watch", is_flag=True, help="Verify again and again, a line each, until Ctrl-C or a claim fails.")
@click.option("--every", type=_Duration(), default="10m", show_default=True, help="With --watch: time between rounds.")
def verify(policy: Path, as_json: bool, watch: bool, every: float) -> None:
    """Measure the policy again on this machine; exit 1 where a claim no longer holds.

    Says first what differs from the machine, the libraries and the text that it was measured with. The footprint must
    stay within the budget, the rate reach the lower end of its interval (less 15 %), the perplexity not exceed the
    upper end of its own.
    """
    from .policy.verify import print_verdicts, verify_rounds

    def phase(text: str) -> None:
        if not watch:
            click.echo(f"  {text}", err=True)

    rounds = verify_rounds(policy, phase, note=lambda text: click.echo(text, err=as_json))
    done = 0
    with _plain_errors(), contextlib.closing(rounds):
        try:
            for report in rounds:
                done += 1
                if as_json:
                    click.echo(json.dumps(report.as_json(), indent=None if watch else 2))
                elif watch:
                    click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {report.line()}")
                else:
                    print_verdicts(report)
                if not report.holds:
                    sys.exit(1)
                if not watch:
                    return
                time.sleep(every)
        except KeyboardInterrupt:
            if not watch:
                raise
            click.echo(f"stopped after {done} rounds; every claim held", err=True)


@_command("generate")
@click.argument("policy", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, or - for standard input.")
@click.option("--new-tokens", type=_Tokens(), default=None, help="Default: as measured.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
def generate(policy: Path, prompt: str, new_tokens: int | None, temperature: float) -> None:
    """Continue a text as the policy says."""
    from .serve.deploy import deploy

    text = sys.stdin.read() if prompt == "-" else prompt
    with _plain_errors():
        llm = deploy(policy)
        with closing(llm.stream(text, new_tokens=new_tokens, temperature=temperature)) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
    click.echo()
    click.echo(llm.last.summary(), err=True)


@_command("serve")
@click.argument("policy", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Another than loopback needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--api-key", envvar="AUTOTUNE_API_KEY", show_envvar=True, help="What clients must send.")
@click.option("--name", help="The model's name in the API. Default: the name of its folder.")
@click.option("--max-queue", type=click.IntRange(min=0), default=16, show_default=True, help="Requests that may wait.")
@click.option("--max-body", type=_Size(), default="4MB", show_default=True, help="The largest request.")
def serve(
    policy: Path, host: str, port: int, api_key: str | None, name: str | None, max_queue: int, max_body: int
) -> None:
    """Answer OpenAI's API as the policy says: chat completions, completions, models; /metrics and /health."""
    try:
        from .serve import server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "jinja2", "uvicorn"):
            raise
        needs = f"autotune serve needs {error.name}, which is not installed: pip install 'autotune-llm[serve]'"
        raise click.UsageError(needs) from None
    if not (api_key or server.is_loopback(host)):
        raise click.UsageError(
            f"--host {host} is open to other machines, and there is no API key: set AUTOTUNE_API_KEY, or use 127.0.0.1"
        )
    try:
        bound = server.bind(host, port)
    except OSError as error:
        raise click.UsageError(f"--host {host} --port {port}: {error.strerror}") from None
    from .serve.deploy import deploy

    with bound:
        with _plain_errors():
            llm = deploy(policy)
        name = name or server.model_name(Path(llm.policy.model.path))
        server.run(server.application(llm, name=name, api_key=api_key, max_queue=max_queue, max_body=max_body), bound)


class _plain_errors:
    """Turn what the user can mend into one line and exit code 2; all else keeps its traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        from .model.folder import PlanError
        from .policy.policy import PolicyError
        from .request import NothingFits
        from .results import RunError
        from .search.space import SpaceError

        if isinstance(error, NothingFits):
            raise _answer_is_no(str(error)) from None
        if isinstance(error, (PlanError, PolicyError, RunError, SpaceError)):
            raise click.UsageError(str(error)) from None


def _answer_is_no(text: str) -> click.ClickException:
    return click.ClickException(text)  # exit code 1


def _request(options: dict[str, Any]) -> Request:
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


def _print_policy(policy: Policy, console: Any) -> None:
    """What was chosen per context, for a person."""
    from rich.table import Table

    from .policy.export import load_text, settings_text, task_text

    table = Table(title=f"load: {load_text(policy.load_group)}", title_justify="left", header_style="bold")
    for column in ("up to", "settings", "tokens/s", "baseline", "times", "peak of budget", "quality loss"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    stock = {entry.context_tokens: entry for entry in policy.baseline}
    asked, floor = policy.workload["contexts"], policy.workload.get("noise_floor", {})
    for rule in policy.rules:
        expected, base = rule.expected, stock.get(rule.max_context_tokens)
        rate = f"{expected.tokens_per_s:.1f}"
        if expected.tokens_per_s_interval is not None:
            rate += " ({:.1f}-{:.1f})".format(*expected.tokens_per_s_interval)
        loss = f"{expected.perplexity_ratio - 1:+.2%}" if expected.perplexity_ratio is not None else "not measured"
        if expected.perplexity_ratio is not None and within_noise(expected.perplexity_ratio, floor):
            loss = "within noise"
        text = settings_text(rule.settings) + (f"; loads {load_text(rule.load)}" if rule.load else "")
        stocks = "does not fit" if rule.max_context_tokens in asked else "-"
        table.add_row(
            str(rule.max_context_tokens),
            text,
            rate,
            f"{base.expected.tokens_per_s:.1f}" if base else stocks,
            "tie" if rule.tie else f"{rule.speedup:.2f}" if rule.speedup else "-",
            f"{mib(expected.peak_bytes)} ({expected.peak_bytes / policy.budget_bytes:.0%})",
            loss + task_text(expected),
        )
    console.print(table)
    for rule in policy.rules:
        console.print(f"up to {rule.max_context_tokens}: {rule.note}", markup=False, highlight=False)
    alone = [(rule.max_context_tokens, rule.unrestricted) for rule in policy.rules if rule.unrestricted]
    if policy.rules[0].reload_s is None:
        shares = ", ".join(f"{1 / fastest.gain:.0%} at {length}" for length, fastest in alone)
        line = f"one load reaches {shares} of what was fastest there in the search, whatever it loads"
    else:
        times = ", ".join(f"{rule.reload_s:.1f} s at {rule.max_context_tokens}" for rule in policy.rules)
        line = f"changing from one load to another takes {times}"
    console.print(line, markup=False, highlight=False)
    for context in asked:
        if context > policy.rules[-1].max_context_tokens:
            console.print(f"{context}: nothing that was measured was feasible; the report says why", markup=False)
