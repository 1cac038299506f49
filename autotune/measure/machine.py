"""What this machine is, what it can run, and what it was doing while something was measured."""

from __future__ import annotations

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
from ..engine.load import Unsupported, compute_dtype, full_precision, quantize_linear, register_split_kv


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
        found["cores"] = os.cpu_count()
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
    """Clocks, temperature, throttling and load now."""
    now: dict[str, Any] = {"load_1m": os.getloadavg()[0]}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        now["governor"] = governor.read_text().strip()
    if device != "cpu":
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        now |= {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }
    return now


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
