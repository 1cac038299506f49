"""Tests that run side by side, and those that must not: a small suite under this one's settings and hooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUITE = """
import os
import time
from pathlib import Path

import pytest

RUNNING = Path("running")


@pytest.fixture(autouse=True)
def _seen():
    mark = RUNNING / os.environ["PYTEST_XDIST_WORKER"]
    mark.touch()
    yield
    mark.unlink()


@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_nothing_runs_beside_what_is_alone(number):
    for _ in range(20):
        assert len(list(RUNNING.iterdir())) == 1
        time.sleep(0.01)


def test_two_run_at_the_same_time():
    for _ in range(1000):
        if len(list(RUNNING.iterdir())) == 2:
            time.sleep(0.1)
            return
        time.sleep(0.02)
    raise AssertionError("nothing ran beside")


@pytest.mark.parametrize("number", range(3))
def test_that_takes_longer(number):
    time.sleep(number * SECONDS)
"""


def test_nothing_runs_beside_what_is_marked_alone(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "running").mkdir()
    for number in range(2):
        (tmp_path / "tests" / f"test_{number}.py").write_text(SUITE.replace("SECONDS", str(number)))
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout
