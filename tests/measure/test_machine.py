"""What the machine did meanwhile: waiting for a processor, and other processes on the GPU."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.measure import machine

HOG = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"


@pytest.mark.alone
def test_a_process_that_shares_its_only_processor_has_waited_for_it() -> None:
    allowed = os.sched_getaffinity(0)
    hogs = [subprocess.Popen([sys.executable, "-c", HOG], start_new_session=True) for _ in range(3)]
    try:
        os.sched_setaffinity(0, {min(allowed)})
        time.sleep(0.3)  # until they run
        before, began = machine.state("cpu"), time.perf_counter()
        while time.perf_counter() - began < 1:
            pass
        share = machine.waiting(before, machine.state("cpu"))
    finally:
        os.sched_setaffinity(0, allowed)
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert 0.25 < share < 1


@pytest.mark.parametrize(
    ("ran", "waited", "share"), [(3.0, 1.0, 0.25), (4.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 2.0, 1.0), (-1.0, 0.0, 0.0)]
)
def test_waiting_is_the_share_of_the_time_in_which_it_could_have_run(ran: float, waited: float, share: float) -> None:
    before = {"ran_s": 10.0, "waited_s": 5.0}
    assert machine.waiting(before, {"ran_s": 10 + ran, "waited_s": 5 + waited}) == share


def test_a_state_holds_what_waiting_is_made_of() -> None:
    before = machine.state("cpu")
    assert before["ran_s"] > 0
    assert 0 <= machine.waiting(before, machine.state("cpu")) <= 1


class NotFound(Exception):
    pass


@pytest.mark.parametrize(
    ("listed", "used", "share"),
    [
        (True, {"own": 90}, 0.0),
        (True, {"own": 30, "other": 60}, 0.6),
        (True, {"other": 80, "third": 70}, 1.0),
        (True, NotFound(), 0.0),
        (False, {"other": 60}, None),  # a container: it does not even see itself
    ],
)
def test_what_others_do_on_the_gpu_is_told_apart_from_our_own(
    monkeypatch: pytest.MonkeyPatch, listed: bool, used: Any, share: float | None
) -> None:
    numbers = {"own": os.getpid(), "other": 1, "third": 2}

    def utilization(handle: object, since: int) -> list[Any]:
        if isinstance(used, Exception):
            raise used
        return [SimpleNamespace(pid=numbers[name], smUtil=value) for name, value in used.items()]

    fake = SimpleNamespace(
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=os.getpid() if listed else 7)],
        nvmlDeviceGetProcessUtilization=utilization,
        NVMLError_NotFound=NotFound,
        NVMLError=Exception,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert machine._others_share(None) == share
