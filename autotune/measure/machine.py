"""What this machine is, what it can run, and what it was doing while something was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..engine.attention import register_split_kv
from ..engine.load import quantize_linear
from ..engine.support import Unsupported, compute_dtype, full_precision
from .memory import nvml_handle


def describe(device: str) -> dict[str, Any]:
    """Device, driver and the versions that a figure depends on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "optimum-quanto")}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "full_precision": full_precision(device),
        "versions": {"autotune": __version__, **libraries},
    }
    if device == "cpu":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        found["device"] = names[0].partition(":")[2].strip() if names else platform.processor()
        found["cores"] = len(os.sched_getaffinity(0))  # that this process may use
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    import pynvml

    pynvml.nvmlInit()
    found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found


def bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes: the ceiling of decoding. Median of five."""
    size = 2**26 if device == "cpu" else 2**30
    try:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
    except torch.OutOfMemoryError:
        return 0.0
    times = []
    for _ in range(6):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size / sorted(times[1:])[2]


def state(device: str) -> dict[str, Any]:
    """Clocks, temperature, throttling and load now, and how long this process has run and waited for a processor."""
    ran, waited = processor_s()
    now: dict[str, Any] = {"load_1m": os.getloadavg()[0], "ran_s": ran, "waited_s": waited}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        now["governor"] = governor.read_text().strip()
    if device != "cpu":
        import pynvml

        handle = nvml_handle(device)
        now |= {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "others_share": _others_share(handle),
        }
    return now


def waiting(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Of the time that this process could have run between two states, the share in which others kept it waiting."""
    ran, waited = (max(0.0, after[name] - before[name]) for name in ("ran_s", "waited_s"))
    return waited / (ran + waited) if ran + waited else 0.0


def processor_s() -> tuple[float, float]:
    """Seconds that this process's threads have run, and that they were ready but no processor was free.

    From Linux's schedstat (Documentation/scheduler/sched-stats); zeros on a system that does not count them.
    """
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            on, ready, _ = path.read_text().split()
            ran, waited = ran + int(on), waited + int(ready)
    return ran / 1e9, waited / 1e9


def _others_share(handle: Any) -> float | None:
    """Share of the last second in which other processes kept the GPU busy; None where NVML does not tell them apart."""
    import pynvml

    try:
        if os.getpid() not in {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}:
            return None  # a container: our own process has another number there
        samples = pynvml.nvmlDeviceGetProcessUtilization(handle, int((time.time() - 1) * 1e6))
    except pynvml.NVMLError_NotFound:  # no sample: nobody used it
        return 0.0
    except pynvml.NVMLError:
        return None
    busiest: dict[int, int] = {}
    for sample in samples:
        if sample.pid != os.getpid():
            busiest[sample.pid] = max(busiest.get(sample.pid, 0), int(sample.smUtil))
    return min(1.0, sum(busiest.values()) / 100)


def probe(words: dict[str, list[str]], device: str, phase: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """For `weights` and `attention` words: those that cannot run here, with the reason. Compiles what it must."""
    failed: dict[str, dict[str, str]] = {}
    for knob, check in (("weights", _run_weights), ("attention", _run_attention)):
        for word in words.get(knob, []):
            slow = " (compiling a kernel, about a minute the first time)" if word == "quanto-int4" else ""
            phase(f"trying {knob} {word}{slow}")
            try:
                check(word, device)
            except (Unsupported, ImportError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
                lines = str(error).strip().splitlines()
                failed.setdefault(knob, {})[word] = lines[0][:300] if lines else type(error).__name__
    return failed


def _run_weights(word: str, device: str) -> None:
    if word == "checkpoint":
        return
    if device == "cpu" and word == "bf16" and full_precision(device) == "fp32":
        raise Unsupported("this processor has no bf16 arithmetic: use fp32")
    linear = nn.Linear(256, 256, bias=False, device=device, dtype=compute_dtype(word, device)).requires_grad_(False)
    layer = quantize_linear(linear, word, device)
    with torch.inference_mode():
        layer(torch.zeros(1, 4, 256, device=device, dtype=compute_dtype(word, device)))
    _synchronize(device)


def _run_attention(word: str, device: str) -> None:
    if word == "split_kv":
        return register_split_kv(device)
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=compute_dtype(full_precision(device), device), attn_implementation=word
    ).to(device)
    with torch.inference_mode():
        seen = model(torch.zeros(1, 8, dtype=torch.long, device=device), use_cache=True)
        model(torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=seen.past_key_values)
    _synchronize(device)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
