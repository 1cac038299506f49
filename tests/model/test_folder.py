"""What a damaged or foreign folder is refused for, by name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.model.folder import PlanError, _header, check_folder
from autotune.model.shape import read_shape
from tests.shapes import SMALL, write_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "num_hidden_layers": 1}))
    write_safetensors(tmp_path / "model.safetensors", {"model.embed_tokens.weight": (320, 64)})
    return tmp_path


def test_a_whole_folder_passes(folder):
    check_folder(folder)


@pytest.mark.parametrize("call", [check_folder, read_shape])
def test_a_missing_folder_or_config_is_named(tmp_path, call):
    with pytest.raises(PlanError, match="nowhere does not exist"):
        call(tmp_path / "nowhere")
    with pytest.raises(PlanError, match=r"no config\.json in"):
        call(tmp_path)


UNUSABLE = [
    json.dumps(SMALL | {"model_type": "gemma2"} | wrong)
    for wrong in (
        {"layer_types": ["full_attention"]},
        {"layer_types": 3},
        {"sliding_window": "all"},
        {"num_key_value_heads": [1, 2, 2]},
        {"num_hidden_layers": 0},
        {"intermediate_size": 1.5},
    )
]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\xff", '{"model_type": "llama", "hidden_size": "4"}', *UNUSABLE]
)
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(PlanError, match=r"config\.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 50, 1000, -1])
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    for call in (check_folder, read_shape):
        with pytest.raises(PlanError, match=r"model\.safetensors is truncated"):
            call(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 30]},
        {"dtype": "BF16", "shape": [-4, -4], "data_offsets": [0, 32]},
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [32, 0]},
        {"dtype": "BF16", "shape": [4, 4], "data_offsets": [-32, 0]},
        {"dtype": "BF16", "shape": [4, 4]},
        {"dtype": "BF16", "shape": 4, "data_offsets": [0, 8]},
        {"dtype": [], "shape": [4], "data_offsets": [0, 8]},
        "BF16",
        None,
    ],
)
def test_a_damaged_header_is_refused(folder, entry):
    text = json.dumps({"a.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))
    with pytest.raises(PlanError, match="damaged safetensors header"):
        check_folder(folder)


@settings(max_examples=200)
@given(text=st.binary(max_size=60), length=st.integers(0, 2**64 - 1) | st.integers(0, 70))
def test_any_bytes_are_read_or_refused(tmp_path_factory, text, length):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text)
    with contextlib.suppress(PlanError):
        _header(path)


def test_a_missing_shard_a_missing_tensor_and_a_path_outside_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    for weight_map, match in [
        ({"model.embed_tokens.weight": "two.safetensors"}, "two.safetensors cannot be read"),
        ({"model.norm.weight": "one.safetensors"}, "no shard holds"),
        ({"model.norm.weight": "../one.safetensors"}, "no weight_map of file names"),
        (None, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(PlanError, match=match):
            check_folder(folder)


def test_pickled_weights_alone_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"no model\.safetensors"):
        check_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PlanError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_folder(folder)
