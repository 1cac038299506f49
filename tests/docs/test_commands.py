"""Every command and example of the papers works: it is run, or what it is given is read by who would run it.

A command runs here on the bundled pair and on the run folder of `folder`; `PARSED` names those whose options are only
read, each with its reason. A command that no rule covers fails, and so does a fence that does not say what is in it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner

from autotune import Policy, Request, Workload
from autotune.cli import main
from autotune.config import Budget, Configuration
from autotune.demo import DRAFT, TARGET
from autotune.model.fingerprint import fingerprint
from autotune.options import request_of
from autotune.request import check_inputs
from autotune.results import storage_url
from autotune.run import conclude
from autotune.search.space import read_space
from autotune.search.study import Studies
from tests.conftest import MakeRecord

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAPERS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
PAPERS = [page for page in PAPERS if page.exists()]
RUN = "results/demo-6199MiB"  # the run folder that the papers speak of
PARSED = {  # of autotune's commands
    "run": "takes minutes; tests/test_run.py runs whole ones",
    "verify": "measures for minutes; tests/policy/test_verify.py verifies a policy",
    "serve": "serves until it is stopped; tests/serve/test_serve.py asks a server, by curl as well",
}
SUBSTITUTED = {"./Llama-3-8B": str(TARGET), "./Llama-3.2-1B": str(DRAFT), "RUN": RUN}
CONTEXTS = "512"  # in `plan`, for whatever is asked for: the bundled pair has 4608 positions
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


class Fence(NamedTuple):
    page: Path
    language: str
    text: str


def fences(page: Path) -> list[Fence]:
    found = re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Fence(page, language, text) for language, text in found]


def unfenced(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


FENCES = [fence for page in PAPERS for fence in fences(page)]


def commands() -> dict[str, str]:
    """Every pipeline of a bash fence, and every command of ours or of a benchmark in a line or a table; by its page."""
    told: dict[str, str] = {}
    for fence in FENCES:
        lines = fence.text.replace("\\\n", " ").splitlines() if fence.language == "bash" else []
        for part in [part for line in lines if not line.startswith("#") for part in line.split(" && ")]:
            told.setdefault(part.strip(), fence.page.name)
    names = "|".join(main.commands)
    for page in PAPERS:
        for part in re.findall(
            rf"`((?:autotune (?:{names}) |python -m benchmarks\.|pip install )[^`]+)`", unfenced(page)
        ):
            told.setdefault(part, page.name)
    return told


# Rules ----------------------------------------------------------------------------------------------------------------


def run(command: str) -> None:
    """Raises what it must where a command of the papers does not work."""
    given = None
    for stage in command.split(" | "):
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(stage)]
        match words:
            case ["echo", *said]:
                given = " ".join(said) + "\n"
            case ["autotune", name, *options]:
                autotune(name, [SUBSTITUTED.get(word, word) for word in options], given)
            case ["python", "-m", module, *options] if module.startswith("benchmarks."):
                benchmark(module, options)
            case ["python3", "-m", "venv", folder]:  # nothing of ours
                assert folder == ".venv"
            case ["pip", "install", *options]:
                install(options)
            case [("ruff" | "mypy" | "lint-imports" | "pytest" | "mkdocs") as tool, *options]:
                check(tool, options)
            case ["curl", url, "--json", body]:
                ask(url, body)
            case _:
                raise AssertionError(f"no rule covers: {command}")


def autotune(name: str, options: list[str], given: str | None) -> None:
    if name == "plan":
        options = [CONTEXTS if before == "--contexts" else word for before, word in pairwise(["", *options])]
        options += [] if "--contexts" in options else ["--contexts", CONTEXTS]
        options += [] if "--space" in options else ["--space", "quick"]
    if name in PARSED:
        parsed = main.commands[name].make_context(name, list(options)).params
        if name == "run":
            assert request_of(parsed).budget.bytes > 0
        return
    done = CliRunner().invoke(main, [name, *options], input=given)
    assert done.exit_code == 0, done.output
    if "--to" in options:
        assert Path(options[options.index("--to") + 1]).stat().st_size > 0
    else:
        assert done.stdout


def benchmark(module: str, options: list[str]) -> None:
    """They take minutes to hours, some of them on a GPU: their parser reads the options."""
    options = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in options]
    try:
        command = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("needs Triton")
    command.make_context(module, options)


def install(options: list[str]) -> None:
    """It takes minutes and a network, and CI does it: the files are there, and so are the extras."""
    if "-c" in options:
        assert (ROOT / options[options.index("-c") + 1]).is_file()
    wanted = [word for word in options if word not in ("-q", "-e", "-c", "constraints.txt")]
    for word in wanted:
        place, _, extras = word.partition("[")
        assert place in (".", PROJECT["project"]["name"])
        assert set(extras.rstrip("]").split(",")) <= {"", *EXTRAS}


def check(tool: str, options: list[str]) -> None:
    """They check this very tree, tests and docs, and CI runs them: what they are given is there."""
    package = {"lint-imports": "import-linter", "mkdocs": "mkdocs-material"}.get(tool, tool)
    assert package in [*EXTRAS["dev"], *EXTRAS["docs"]]
    marker = options[options.index("-m") + 1] if "-m" in options else None
    assert marker is None or any(
        line.startswith(f"{marker}:") for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    )
    words = ("-q", "-m", marker, "format", "check", "--check", "build", "--strict")
    for path in (word for word in options if word not in words):
        assert (ROOT / path).exists(), path


def ask(url: str, body: str) -> None:
    """A server answers until it is stopped: its own reader takes the body, and its routes have the path."""
    from autotune.serve.deploy import deploy
    from autotune.serve.openai_api import ChatRequest, parse
    from autotune.serve.server import application, model_name

    llm = deploy(f"{RUN}/policy.json")
    name = model_name(Path(llm.policy.model.path))
    routes = application(llm, name=name, api_key=None, max_queue=1, max_body=10**6).routes
    assert url.partition("8000")[2] in {getattr(route, "path", "") for route in routes}
    assert parse(ChatRequest, body.encode()).model == name


# The run folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, record: MakeRecord) -> Path:
    """A working folder as a reader would have it, with a run folder whose records were invented."""
    here = tmp_path_factory.mktemp("reader")
    out = here / RUN
    out.mkdir(parents=True)
    workload = Workload(contexts=(64, 256), new_tokens=64)
    budget = Budget(6_500_000_000)
    info = {
        "model": str(TARGET),
        "drafts": [],
        "budget": dataclasses.asdict(budget),
        "workload": dataclasses.asdict(workload),
        "space": "default",
        "study": "run",
        "storage": None,
        "identity": {"model": fingerprint(TARGET), "drafts": []},
        "environment": {"device_word": "cpu", "device": "invented", "full_precision": "fp32"},
    }
    (out / "run.json").write_text(json.dumps(info))
    stock = Configuration("fp32", "fp32")
    fast = stock.replace(draft="prompt-lookup", depth=2, cache="static")
    studies = Studies(storage_url(out, info), "run", {}, workload.contexts, seed=0)
    for context in workload.contexts:
        studies.keep(record(stock, context, (50.0, 51.0, 49.0), stage="baseline"))
        for stage in ("search", "final"):
            studies.keep(record(fast, context, stage=stage))
        studies.keep(record(stock, context, (50.0, 51.0, 49.0), stage="final"))
    assert conclude(out, dict.fromkeys(workload.contexts, fast), dict.fromkeys(workload.contexts, stock)) is not None
    (here / "policy.json").write_bytes((out / "policy.json").read_bytes())
    (here / "questions.jsonl").write_text('{"question": "def main():", "answer": "pass"}\n')
    for swept in ("quick.jsonl.gz", "sweep.jsonl.gz"):  # which a benchmark would have written
        (here / swept).touch()
    (space,) = (fence.text for fence in FENCES if fence.language == "toml")
    (here / "mine.toml").write_text(space)
    return here


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("autotune.measure.memory.Meter.cap", lambda meter: None)  # this process holds the tests as well
    return folder


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [pytest.param(told, id=f"{page}: {told}") for told, page in commands().items()])
@pytest.mark.usefixtures("here")
def test_a_command_of_the_papers_works(command: str) -> None:
    run(command)


@pytest.mark.parametrize(
    "command",
    [
        "frobnicate --all",
        "autotune fly",
        "autotune run --budget 6.5XB",
        "autotune run --budget 6.5GB --fast",
        "autotune plan --budget 6.5GB --space nowhere",
        "autotune export nowhere --format csv",
        "python -m benchmarks.rig pair --sise 8b",
        "python -m benchmarks.nothing",
        "pip install 'autotune-llm[nothing]'",
        "pytest -q tests/nothing",
        "pytest -q -m tpu",
        'curl localhost:8000/v2/chat --json \'{"model": "target", "messages": []}\'',
    ],
)
@pytest.mark.usefixtures("here")
def test_a_command_that_does_not_work_or_that_no_rule_covers_is_found(command: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, KeyError, ModuleNotFoundError)):
        run(command)


def test_commands_are_found_in_fences_and_in_text() -> None:
    found = list(commands())
    assert {f"autotune {name}" for name in main.commands} <= {" ".join(command.split()[:2]) for command in found}
    assert "autotune generate results/demo-6199MiB/policy.json --prompt -" in " ".join(found)  # in a pipe
    assert "autotune report RUN" in found  # in a table


def test_a_fence_says_what_is_in_it() -> None:
    assert {fence.language for fence in FENCES} == {"bash", "python", "toml"}


@pytest.mark.parametrize(
    "page", [page for page in PAPERS if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_examples_in_python_run(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's examples go on from each other. A search is not made, and the repository's schema not written."""

    def tune(request: Request) -> Policy:
        workload = dataclasses.replace(request.workload, contexts=(64,))
        check_inputs(dataclasses.replace(request, model=TARGET, drafts=[DRAFT], workload=workload))
        return Policy.load(here / "policy.json")

    monkeypatch.setattr("autotune.run.tune", tune)
    schema = here / "policy.schema.json"
    monkeypatch.setattr("autotune.policy.policy.SCHEMA_FILE", schema)
    names: dict[str, Any] = {}
    for fence in fences(page):
        if fence.language == "python":
            exec(compile(fence.text, str(page), "exec"), names)
    if schema.exists():
        assert schema.read_text() == (ROOT / "autotune" / "policy.schema.json").read_text()
        schema.unlink()


def test_the_search_space_of_the_papers_is_one(here: Path) -> None:
    assert set(read_space("mine.toml").choices["weights"]) == {"bf16", "quanto-int4", "bnb-nf4"}


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 120


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", unfenced(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", unfenced(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
