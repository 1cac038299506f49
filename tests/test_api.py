import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import autotune
from autotune import Budget, Policy, Request, Workload, tune
from autotune.cli import main
from autotune.demo import DRAFT, TARGET
from autotune.options import request_of
from autotune.policy.policy import PolicyError
from autotune.request import NothingFits

PUBLIC = ["LLM", "Budget", "Policy", "Request", "Workload", "deploy", "tune"]


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert autotune.__all__ == PUBLIC
    assert all(getattr(autotune, name).__module__.startswith("autotune.") for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(autotune))
    with pytest.raises(AttributeError, match="'autotune' has no attribute 'read_policy'"):
        _ = autotune.read_policy


def test_types_travel_with_the_package() -> None:
    assert (files("autotune") / "py.typed").is_file()


@pytest.mark.parametrize("code", ["import autotune", "from autotune import Budget, Policy, Request, Workload, tune"])
def test_all_but_deploying_is_imported_without_torch(code: str) -> None:
    code += "\nimport sys\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_model_and_a_budget_make_a_request() -> None:
    request = Request(Path("models/Llama-3-8B"), Budget.of("6.5GB", "cuda:0"))
    assert (request.budget.bytes, request.budget.device) == (6_500_000_000, "cuda:0")
    assert request.out == Path("results/Llama-3-8B-6199MiB")
    assert (request.workload, request.space_name, request.drafts) == (Workload(), "default", [])
    assert request.space.choices["cache"]
    assert Request(TARGET, Budget.of("1GiB")).out == Path("results/demo-1024MiB")


def test_what_cannot_fit_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(NothingFits, match="under the smallest predicted footprint"):
        tune(Request(TARGET, Budget.of("1MB"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_policy_is_loaded_from_its_file_or_refused_with_its_reason(tmp_path: Path) -> None:
    reference = Path(__file__).parents[1] / "results" / "reference" / "policy.json"
    policy = Policy.load(reference)
    assert policy.rules
    assert policy.load_group.weights
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"policy\.json: model: Field required"):
        Policy.load(str(tmp_path / "policy.json"))


def test_a_request_has_the_defaults_of_the_command_line() -> None:
    asked = request_of(main.commands["run"].make_context("run", ["--budget", "1GiB", "--device", "cpu"]).params)
    request = Request(TARGET, Budget.of("1GiB"), drafts=[DRAFT], started=asked.started)
    assert request == asked
