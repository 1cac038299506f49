"""What all tests share: one thread each, tests that run alone, a quick storage."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests, and workers of theirs, run beside each other

import optuna
import pytest
import sqlalchemy
from hypothesis import HealthCheck, settings

from autotune.config import Record
from tests.records import synthetic_record

MakeRecord = Callable[..., Record]
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how fast this machine is now is no property


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `alone` comes last."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """While a test marked `alone` runs, no other process of pytest-xdist runs any, here or in another run of ours."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with Path(__file__).open() as door, (item.config.rootpath / "pyproject.toml").open() as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # whoever waits for the room keeps the others from entering it before
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def record() -> MakeRecord:
    return synthetic_record


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For long searches whose storage nobody opens again."""
    monkeypatch.setattr("autotune.search.study.open_storage", lambda url: optuna.storages.InMemoryStorage())


@pytest.fixture
def uncompiled_quanto(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto unpacks its bits in Python: its extension takes a minute to compile."""
    import torch
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))


@pytest.fixture(scope="session", autouse=True)
def _references_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the user's own are used nor any left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("references")))
        yield


@pytest.fixture(autouse=True)
def _do_not_wait_for_the_disk() -> Iterator[None]:
    """A trial is some twenty commits; what a power failure would leave is not tested here."""

    def faster(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", faster)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", faster)
