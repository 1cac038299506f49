"""Records of measurements that never happened, for the tests of everything that reads records; and a quick storage."""

from __future__ import annotations

import os

# Models in tests are tiny: a second thread gives nothing, and beside other work each spins until the other comes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy

from autotune.config import MIB, Configuration, Outcome, Record
from autotune.search.watch import Watch

MakeRecord = Callable[..., Record]


def synthetic_record(
    configuration: Configuration,
    context: int,
    rates: tuple[float, ...] = (100.0, 101.0, 99.0),
    *,
    outcome: Outcome = "ok",
    ratio: float | None = 1.0,
    peak: int = 500 * MIB,
    ttft_s: float = 0.1,
    **figures: Any,
) -> Record:
    """A record whose rounds ran at `rates` tokens/s end to end: one prompt a round, 100 new tokens after each."""
    steps = [[(100 / rate - ttft_s) / 99] * 99 for rate in rates]
    samples = [
        {"round": number, "prompt": 0, "new_tokens": 100, "ttft_s": ttft_s, "step_s": step, "step_tokens": [1] * 99}
        | {"proposed": 0, "accepted": 0, "verifications": 0}
        for number, step in enumerate(steps)
    ]
    measured: dict[str, Any] = {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_interval": (min(rates), max(rates)),
        "decode_tokens_per_s": statistics.median(99 / sum(step) for step in steps),
        "ttft_s": ttft_s,
        "peak_bytes": peak,
        "perplexity_ratio": ratio,
        "witness": "resident set",
        "load_s": 2.0,
        "measure_s": 1.0,
        "samples": samples,
    }
    return Record(configuration, context, outcome, **(measured | figures))


@pytest.fixture(scope="session")
def record() -> MakeRecord:
    return synthetic_record


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For long searches whose storage nobody opens again."""
    monkeypatch.setattr("autotune.search.study.open_storage", lambda url: optuna.storages.InMemoryStorage())


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


class Notes(Watch):
    """Keeps what a run notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
