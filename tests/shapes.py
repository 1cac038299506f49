"""Shapes of models that are not there: a config is all that a plan reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from autotune.config import Configuration
from autotune.model.calibration import DEFAULT, predict
from autotune.model.footprint import Prediction
from autotune.model.shape import ModelShape, read_shape

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}


def shape_of(folder: Path, config: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(folder)


def at(shape: ModelShape, configuration: Configuration, context: int = 128, **more: Any) -> Prediction:
    arguments = {"new_tokens": 96, "device": "cuda:0", "calibration": DEFAULT["cuda"]} | more
    return predict(shape, arguments.pop("draft", None), configuration, context, **arguments)


NF4 = Configuration(weights="bnb-nf4")
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def write_safetensors(path: Path, sizes: dict[str, tuple[int, ...]], dtypes: dict[str, str] | None = None) -> None:
    header, end = {}, 0
    for name, size in sizes.items():
        dtype = (dtypes or {}).get(name, "BF16")
        count = 1
        for n in size:
            count *= n
        begin, end = end, end + count * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
