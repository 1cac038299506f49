"""What tests of the search share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves only when it is told to."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("autotune.search.search.time", SimpleNamespace(monotonic=lambda: now.s))
    return now
