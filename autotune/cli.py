"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from . import __version__
from .config import mib
from .options import Duration, Size, Tokens, request_of, run_options

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
@run_options
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

    from .report.policy_table import print_policy
    from .report.progress import Display
    from .run import tune

    request = request_of(options)
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
    print_policy(policy, console)
    console.print(f"\n{request.out}/{WRITTEN}", markup=False)


def _nothing_feasible(folder: Path, so_far: str = "") -> str:
    return f"no configuration was feasible{so_far}; {folder}/report.html says why each was not"


@_command("plan")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--by-layer", is_flag=True, help="List the weights' and the cache's bytes per layer.")
def plan(as_json: bool, by_layer: bool, **options: Any) -> None:
    """Predict the footprint of every configuration and context; measures nothing."""
    from .report.plan_table import print_layers, print_plan

    request = request_of(options)
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
@click.option("--every", type=Duration(), default="10m", show_default=True, help="With --watch: time between rounds.")
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
@click.option("--new-tokens", type=Tokens(), default=None, help="Default: as measured.")
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
@click.option("--max-body", type=Size(), default="4MB", show_default=True, help="The largest request.")
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
