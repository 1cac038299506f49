"""GPTQ and AWQ checkpoints compute what the weights that they hold compute, in 4 bits."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from autotune.cli import main
from autotune.config import Configuration, LoadGroup
from autotune.demo import TARGET
from autotune.engine import support
from autotune.engine.decode import Engine
from autotune.engine.linear import Slice
from autotune.engine.load import load_model, packed
from autotune.engine.load.packed import PackedLinear, Reordered
from autotune.engine.support import Unsupported
from autotune.measure.memory import module_bytes
from autotune.model.calibration import DEFAULT, predict
from autotune.model.folder import PlanError
from autotune.model.shape import read_shape
from autotune.trial.worker import Worker
from tests.packed_checkpoints import pack, save_packed
from tests.tiny_models import logits, tiny, tokens

SIZE = {"hidden_size": 64, "intermediate_size": 128}
GPTQ = {"quant_method": "gptq", "sym": False}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True}
FORMATS = {
    "gptq": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq-unnamed-format": GPTQ,
    "gptq-v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq-symmetric": {**GPTQ, "sym": True},
    "gptq-whole-rows": {**GPTQ, "group_size": -1},
    "gptq-desc-act": {**GPTQ, "desc_act": True},
    "gptq-other-orders": {**GPTQ, "desc_act": True, "orders_differ": True, "group_size": 16},
    "awq": AWQ,
    "awq-64": {**AWQ, "group_size": 64},
}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "full_precision", lambda device: "fp32")


def qwen2() -> PreTrainedModel:
    """With biases, and a tied head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 89}
        model = Qwen2ForCausalLM(Qwen2Config(**SIZE, **heads, tie_word_embeddings=True, initializer_range=0.4))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    return model.float().eval().requires_grad_(False)  # type: ignore[no-any-return]


def make(name: str) -> PreTrainedModel:
    return qwen2() if name == "qwen2" else tiny(name, **SIZE)


def as_stored(folder: Path, **options: Any) -> PreTrainedModel:
    return load_model(folder, weights="checkpoint", **options)


def text(model: PreTrainedModel) -> list[int]:
    return Engine(model, None, LoadGroup(), "cpu").generate(tokens(60), Configuration(), 30).tokens


def kinds(model: PreTrainedModel) -> set[type]:
    return {type(module) for module in model.modules()} & {nn.Linear, PackedLinear, Reordered, Slice}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_checkpoint_computes_what_its_weights_do(tmp_path: Path, form: str, name: str, merge: bool) -> None:
    held = save_packed(make(name), tmp_path, **FORMATS[form])
    ours = as_stored(tmp_path, merge=merge)
    assert kinds(ours) >= {PackedLinear} | ({Slice} if merge and form != "gptq-other-orders" else set())
    assert (Reordered in kinds(ours)) == bool(FORMATS[form].get("desc_act"))
    torch.testing.assert_close(logits(ours), logits(held), rtol=1e-3, atol=1e-3)
    assert len(set(text(held))) > 5
    assert text(ours) == text(held)


def test_an_unmerged_layer_has_the_bits_of_its_weight(tmp_path: Path) -> None:
    held = save_packed(make("llama"), tmp_path, **AWQ)
    assert torch.equal(logits(as_stored(tmp_path)), logits(held))


@pytest.mark.parametrize("form", ["gptq-desc-act", "awq"])
def test_a_layer_that_is_expanded_in_parts_is_the_same(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = save_packed(make("qwen2"), tmp_path, **FORMATS[form])
    monkeypatch.setattr(packed, "EXPANDED", 64 * 40)  # neither layer's height is a multiple
    torch.testing.assert_close(logits(as_stored(tmp_path)), logits(held), rtol=1e-3, atol=1e-3)


def test_parts_in_different_files_are_found(tmp_path: Path) -> None:
    held = save_packed(make("llama"), tmp_path, shards=3, **GPTQ)
    assert text(as_stored(tmp_path)) == text(held)


def test_layers_that_were_left_as_they_are_stay_so_and_a_packed_head_is_read(tmp_path: Path) -> None:
    held = save_packed(tiny("llama", vocab_size=96, **SIZE), tmp_path, plain=("layers.1.mlp", "v_proj"), **GPTQ)
    for merge in (False, True):
        ours = as_stored(tmp_path, merge=merge)
        assert nn.Linear in kinds(ours)
        assert type(ours.get_output_embeddings()) is PackedLinear
        torch.testing.assert_close(logits(ours), logits(held), rtol=1e-3, atol=1e-3)


def test_an_empty_g_idx_is_of_no_effect_without_desc_act(tmp_path: Path) -> None:
    held = save_packed(make("llama"), tmp_path, **GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    empty = {name: torch.zeros_like(tensor) if "g_idx" in name else tensor for name, tensor in tensors.items()}
    save_file(empty, tmp_path / "model.safetensors", {"format": "pt"})
    assert text(as_stored(tmp_path)) == text(held)


def test_words_are_packed_as_the_formats_say() -> None:
    assert pack(torch.arange(1, 9)[None]).item() == 0x87654321 - 2**32
    assert pack(torch.zeros(1, 8, dtype=torch.int64), less=0x11111111).item() == 0xEEEEEEEF - 2**32
    assert pack(torch.arange(8)[None], (0, 2, 4, 6, 1, 3, 5, 7)).item() == 0x75316420


# ---- memory


@pytest.mark.parametrize("form", ["gptq", "gptq-desc-act", "awq"])
@pytest.mark.parametrize("group", [32, 128])
def test_the_plan_knows_what_a_packed_checkpoint_holds(
    tmp_path: Path, form: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "full_precision", lambda device: "bf16")
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    save_packed(model, tmp_path, **{**FORMATS[form], "group_size": group})
    ours, shape = as_stored(tmp_path), read_shape(tmp_path)
    assert (shape.parameters, shape.prequantized, shape.mlp_copies) == (model.num_parameters(), True, 3)
    owners = predict(shape, None, Configuration(weights="checkpoint"), 64, 8, "cpu", DEFAULT["cpu"]).owners
    embeddings = ours.get_input_embeddings()
    assert owners["embeddings"] == owners["lm_head"] == module_bytes(embeddings)
    weights = module_bytes(ours) - 2 * module_bytes(embeddings)
    assert weights < owners["weights"] < 1.06 * weights
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear) - 89 * 256
    assert weights < linear * (0.5 + 3 / group) * 1.05


PEAK = """
import ctypes, json, sys

libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 4 * 2**20)  # as measure/memory.py does
libc.mallopt(-1, 16 * 2**20)

import torch
from autotune.engine import load
from autotune.measure.memory import Meter, _status, module_bytes

torch.set_num_threads(1)
small, *folders = sys.argv[1:]
meter = Meter("cpu", None)
for folder in folders:
    load.load_model(small, weights="checkpoint")  # its code is in memory from here on
    meter.begin()
    before = _status("VmRSS")
    model = load.load_model(folder, weights="checkpoint")
    print(json.dumps({"grown": _status("VmHWM") - before, "footprint": module_bytes(model)}))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_loading_never_holds_more_than_the_result_and_one_tensor(tmp_path: Path) -> None:
    size = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    save_packed(make("llama"), tmp_path / "small", **AWQ)
    forms = {"gptq": {**GPTQ, "desc_act": True}, "awq": AWQ}
    for name, form in forms.items():
        save_packed(tiny("llama", **size), tmp_path / name, **{**form, "group_size": 128})
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("small", *forms))]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    for seen in lines:
        assert seen["footprint"] * 0.9 < seen["grown"] < seen["footprint"] + 8192 * 512 * 2 + 4e6, seen


def test_a_quantized_reference_that_the_device_cannot_hold_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Engine:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Engine, "load", load)
    worker = Worker(io.StringIO())
    worker.device = "cpu"
    with pytest.raises(torch.OutOfMemoryError):
        worker.load_reference(str(TARGET), "checkpoint")


# ---- the engine's own 4-bit layer


class Int4:
    """Stands for the GPU's layer: the same numbers, expanded."""

    calls: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: nn.Parameter | None
    ) -> nn.Module:
        assert codes.dtype == zero.dtype == torch.uint8
        assert max(codes.max(), zero.max()) < 16
        assert scale.shape == zero.shape == (codes.shape[1] // 128, len(codes))
        cls.calls.append(tuple(codes.shape))
        linear = nn.Linear(codes.shape[1], len(codes), bias=bias is not None).requires_grad_(False)
        grouped = codes.float().unflatten(1, (-1, 128))
        linear.weight.copy_(((grouped - zero.T[..., None]) * scale.T[..., None]).flatten(1))
        if bias is not None:
            linear.bias = bias
        return linear


@pytest.mark.parametrize(
    ("form", "group", "calls"),
    [("gptq", 128, 8), ("gptq-symmetric", -1, 8), ("gptq-desc-act", 128, 8), ("awq", 256, 8), ("gptq", 64, 0)],
)
def test_groups_of_128_become_the_engines_own_layer(
    tmp_path: Path, form: str, group: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "Int4Linear", Int4)
    monkeypatch.setattr(packed, "int4_multiplies", lambda device, dtype, out, inp: inp % 128 == 0)
    monkeypatch.setattr(Int4, "calls", [])
    model = tiny("llama", hidden_size=256, intermediate_size=512, initializer_range=0.1, attention_bias=True)
    held = save_packed(model, tmp_path, **{**FORMATS[form], "group_size": group})
    ours = as_stored(tmp_path, merge=True)
    assert len(Int4.calls) == calls
    assert (PackedLinear in kinds(ours)) == (calls == 0)
    torch.testing.assert_close(logits(ours), logits(held), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gptq", "gptq-desc-act", "awq"])
@pytest.mark.parametrize("group", [64, 128])
def test_a_packed_checkpoint_on_a_gpu_is_near_its_weights(
    tmp_path: Path, form: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    monkeypatch.setattr(support, "full_precision", lambda device: "bf16")
    model = tiny("llama", hidden_size=256, intermediate_size=512, initializer_range=0.05)
    held = save_packed(model, tmp_path, **{**FORMATS[form], "group_size": group})
    ours = as_stored(tmp_path, device="cuda")
    assert (PackedLinear in kinds(ours)) == (group == 64)
    with torch.inference_mode():
        found = ours(torch.tensor([tokens(60)], device="cuda")).logits[0].float().cpu()
    assert ((found - logits(held)).norm() / logits(held).norm()).item() < 0.05


# ---- what cannot be read says so


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 3}, r"quantization_config\.bits is 3: gptq checkpoints are read in 4 bits only"),
        ({"bits": "4"}, r"quantization_config\.bits is '4'"),
        ({"group_size": 0}, r"quantization_config\.group_size is 0"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; of gptq only gptq, gptq_v2 is read"),
        ({"quant_method": "awq", "version": "gemv"}, r"quantization_config\.version is 'gemv'"),
        ({"quant_method": "awq", "zero_point": False}, r"quantization_config\.zero_point is false"),
        ({"quant_method": "awq", "backend": "llm-awq"}, r"quantization_config\.backend is 'llm-awq'"),
        (
            {"dynamic": {r"+:.*\.0\..*": {"bits": 8}}},
            r"quantization_config\.dynamic gives .*bits = 8, and the others have 4",
        ),
        ({"dynamic": {r".*down_proj": {"group_size": 16}}}, r"\.dynamic gives '.*down_proj' group_size = 16"),
        ({"dynamic": {r".*down_proj": {"desc_act": True}}}, r"\.dynamic gives '.*down_proj' desc_act = True"),
        ({"extra_config": {"model.layers.0": {"bits": 2}}}, r"\.extra_config gives 'model.layers.0' bits = 2"),
        ({"dynamic": ["mlp"]}, r"quantization_config\.dynamic is \['mlp'\]"),
    ],
)
def test_a_variant_that_is_not_read_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    save_packed(make("llama"), tmp_path, **GPTQ)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=reason):
        as_stored(tmp_path)
    with pytest.raises(PlanError, match=rf"config\.json: .*{reason}"):
        read_shape(tmp_path)


def test_overrides_that_change_nothing_of_what_is_packed_are_read(tmp_path: Path) -> None:
    held = save_packed(make("llama"), tmp_path, plain=("lm_head", "layers.0"), **GPTQ)
    config = json.loads((tmp_path / "config.json").read_text())
    same = {"bits": 4, "group_size": config["quantization_config"]["group_size"], "desc_act": False, "mse": 2.4}
    config["quantization_config"]["dynamic"] = {r"-:model\.layers\.0\..*": {}, r"+:.*mlp.*": same}
    config["quantization_config"]["extra_config"] = {"lm_head": {"bits": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path).exact
    found, wanted = logits(as_stored(tmp_path)), logits(held)
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.05


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("qweight", torch.zeros(16, 128, dtype=torch.int32), r"qweight has shape \(16, 128\), .*\(8, 128\)"),
        ("qweight", torch.zeros(8, 128), r"qweight has the type torch\.float32, not torch\.int32"),
        ("qzeros", torch.zeros(1, 16, dtype=torch.int32), r"qzeros has shape \(1, 16\), the config says \(2, 16\)"),
        ("qzeros", None, "the checkpoint has no tensor for .*qzeros"),
        ("scales", torch.zeros(2, 128, dtype=torch.int32), "scales has the type torch.int32, not a floating one"),
        ("scales", torch.zeros(128), r"scales has shape \(128,\)"),
        ("g_idx", None, "the checkpoint has no tensor for .*g_idx"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "g_idx does not put 32 inputs in each of 2 groups"),
        ("g_idx", torch.full((64,), 2**30, dtype=torch.int32), "g_idx does not put 32 inputs"),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx does not put 32 inputs"),
        ("qweight", None, r"the checkpoint has no tensor for model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_damaged_layer_is_named(tmp_path: Path, part: str, tensor: torch.Tensor | None, reason: str) -> None:
    save_packed(make("llama"), tmp_path, **{**GPTQ, "desc_act": True})
    tensors = {**load_file(tmp_path / "model.safetensors"), f"{NAME}.{part}": tensor}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unsupported, match=reason):
        as_stored(tmp_path)


def test_layers_without_whole_groups_are_named(tmp_path: Path) -> None:
    save_packed(make("llama"), tmp_path, **GPTQ)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"q_proj: a layer of 64 x 64 weights has no whole groups of 48 inputs"):
        as_stored(tmp_path)


def test_the_command_line_refuses_three_bits_by_name(tmp_path: Path) -> None:
    save_packed(make("llama"), tmp_path, **GPTQ)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 3'))
    for command in ("plan", "run"):
        answer = CliRunner().invoke(
            main, [command, "--model", str(tmp_path), "--budget", "1GB", "--contexts", "64", "--device", "cpu"]
        )
        assert answer.exit_code == 2
        assert "quantization_config.bits is 3: gptq checkpoints are read in 4 bits only" in answer.output
