"""The cap, the peaks and the sizes, in processes of their own where limits are set."""

import gc
import subprocess
import sys
import textwrap
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from autotune.engine.load import load_model, quantize_linear
from autotune.measure.memory import module_bytes, out_of_memory

pytestmark = pytest.mark.alone

PRELUDE = """
import ctypes, mmap, time
import torch
from autotune.config import MIB
from autotune.measure.memory import Meter, _status

def refused(size):
    try:
        torch.ones(size, dtype=torch.uint8)
    except RuntimeError as error:
        return "can't allocate memory" in str(error)
    return False

"""


def in_a_process(code: str) -> list[str]:
    """What the code prints, line by line, in a process whose limits it may change."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()


def storages_held(module: nn.Module) -> int:
    """Bytes of every tensor storage that can be reached from a module, however it is packed, by walking the heap."""
    seen: set[int] = set()
    sizes: dict[int, int] = {}
    todo: list[Any] = [module]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, str, bytes)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor) and not hasattr(thing, "__tensor_flatten__"):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        todo += gc.get_referents(thing)
        todo += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return sum(sizes.values())


@pytest.mark.parametrize("word", ["bf16", "fp32", "bnb-nf4", "bnb-fp4", "bnb-int8", "quanto-int8"])
def test_the_bytes_of_a_linear_layer_are_those_of_its_storages(word: str) -> None:
    dtype = torch.float32 if word == "fp32" else torch.bfloat16
    layer = quantize_linear(nn.Linear(512, 256, dtype=dtype).requires_grad_(False), word, "cpu")
    assert module_bytes(layer) == storages_held(layer)
    layer(torch.zeros(1, 4, 512, dtype=dtype))
    gc.collect()
    assert module_bytes(layer) == storages_held(layer)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bf16", 512 * 256 * 2 + 256 * 2),
        # 4 bits each; a byte per 64 weights; a float32 per 256 of those; two code books and an offset; the bias
        ("bnb-nf4", 512 * 256 // 2 + 512 * 256 // 64 + 512 * 256 // 64 // 256 * 4 + (16 + 256 + 1) * 4 + 256 * 2),
        ("bnb-int8", 512 * 256 + 256 * 4 + 256 * 2),
    ],
)
def test_the_bytes_of_a_linear_layer_are_what_its_format_takes(word: str, expected: int) -> None:
    layer = quantize_linear(nn.Linear(512, 256, dtype=torch.bfloat16).requires_grad_(False), word, "cpu")
    assert module_bytes(layer) == expected


def test_what_two_modules_share_counts_once_and_nothing_counts_as_nothing() -> None:
    embedding, head = nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)
    head.weight = embedding.weight
    assert module_bytes(nn.ModuleList([embedding, head])) == 100 * 16 * 4
    assert module_bytes(None) == 0


def test_a_whole_quantized_model_is_the_sum_of_its_storages() -> None:
    from autotune.demo import DRAFT

    model = load_model(DRAFT, weights="bnb-nf4", lm_head="int8")
    gc.collect()
    assert module_bytes(model) == storages_held(model)


def test_the_cap_on_a_cpu_refuses_what_is_over_the_budget_and_leaves_the_process_usable() -> None:
    said = in_a_process("""
        meter = Meter("cpu", _status("VmRSS") + 300 * MIB)
        kept = torch.ones(100 * MIB, dtype=torch.uint8)
        print(refused(400 * MIB))
        print(refused(250 * MIB))
        meter.begin()
        print(refused(250 * MIB))
        del kept
        print(refused(250 * MIB))
        print(meter.peaks()["peak_bytes"] <= meter.budget)
    """)
    assert said == ["True", "True", "True", "False", "True"]


def test_without_a_budget_nothing_is_refused() -> None:
    assert in_a_process("""
        Meter("cpu", None)
        print(refused(600 * MIB))
    """) == ["False"]


def test_a_budget_that_the_process_already_passes_is_refused_with_both_sizes() -> None:
    (said,) = in_a_process("""
        try:
            Meter("cpu", 10 * MIB)
        except MemoryError as error:
            print(error)
    """)
    assert said.startswith("the process holds ")
    assert said.endswith(" MiB before any weight; the budget is 10 MiB")


def test_peaks_keep_what_was_freed_and_begin_forgets_it() -> None:
    before, peak, after = map(int, in_a_process("""
        meter = Meter("cpu", None)
        meter.begin()
        print(meter.peaks()["peak_bytes"])
        torch.ones(500 * MIB, dtype=torch.uint8)
        print(meter.peaks()["peak_bytes"])
        meter.begin()
        print(meter.peaks()["peak_bytes"])
    """))  # fmt: skip
    assert peak - before >= 495 * 2**20
    assert after - before <= 50 * 2**20


@pytest.mark.parametrize(
    "how",
    [
        "spike = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS); touch(spike); spike.close()",
        "spike = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); touch(spike); spike.close()",
        "libc.malloc.restype = ctypes.c_void_p; spike = libc.malloc(size); ctypes.memset(spike, 1, size);"
        "libc.free(ctypes.c_void_p(spike))",
    ],
    ids=["shared", "private", "malloc"],
)
def test_a_peak_is_seen_however_short_and_whoever_allocated_it(how: str) -> None:
    before, peak = map(int, in_a_process(f"""
        libc, size = ctypes.CDLL(None), 300 * MIB
        def touch(spike):
            for page in range(0, size, mmap.PAGESIZE):
                spike[page] = 1
        meter = Meter("cpu", None)
        meter.begin()
        print(meter.peaks()["peak_bytes"])
        {how}
        print(meter.peaks()["peak_bytes"])
    """))  # fmt: skip
    assert peak - before >= 295 * 2**20


def test_shared_memory_escapes_the_limit_but_not_the_peak() -> None:
    said = in_a_process("""
        meter = Meter("cpu", _status("VmRSS") + 200 * MIB)
        meter.begin()
        with mmap.mmap(-1, 300 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as spike:
            for page in range(0, 300 * MIB, mmap.PAGESIZE):
                spike[page] = 1
        print(meter.peaks()["peak_bytes"] > meter.budget)
    """)
    assert said == ["True"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError("no room"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("unable to mmap 14696792 bytes from file <m>: Cannot allocate memory (12)"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
        (None, False),
    ],
)
def test_an_allocation_that_failed_is_told_from_other_errors(error: BaseException | None, expected: bool) -> None:
    assert out_of_memory(error) == expected


@pytest.mark.gpu
def test_kernels_go_to_the_capped_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    last = torch.cuda.device_count() - 1
    (current,) = in_a_process(f"""
        Meter("cuda:{last}", None)
        print(torch.cuda.current_device())
    """)
    assert int(current) == last
