"""What the files of a model folder say of it: `config.json` and the headers of the safetensors files, checked.

A header is 8 bytes of length and a JSON text (https://github.com/huggingface/safetensors#format). Folders are
untrusted: nothing here reads a weight or runs code, and what is damaged is refused by the file's name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors library
# Bits of an element, by the words of the safetensors format.
_DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_DTYPE_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


class PlanError(ValueError):
    """A model folder that cannot be planned for; the message names it and what mends it."""


def check_folder(folder: Path) -> None:
    """Raises PlanError unless the folder holds a config.json and whole safetensors files (headers only are read)."""
    read_config(folder)
    if read_tensors(folder):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        mend = "save the model again with save_pretrained, which writes safetensors"
        raise PlanError(f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; {mend}")
    raise PlanError(f"no {SINGLE} and no {INDEX} in {folder}; download the model's weights into it")


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PlanError(f"the folder {folder} does not exist; give the folder of a downloaded model")
    if not (folder / CONFIG).is_file():
        raise PlanError(f"no {CONFIG} in {folder}; give the folder of a Hugging Face model")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON ({error}); download it again") from error
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} does not hold a JSON object; download it again")
    return data


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    stored: int


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name; empty where the folder has no safetensors."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        return {}
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
        raise PlanError(f"{folder / INDEX} has no weight_map of file names; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= _header(folder / shard)
    if missing := shards.keys() - tensors.keys():
        raise PlanError(f"{folder / INDEX} names '{min(missing)}', which no shard holds; download the model again")
    return tensors


def _header(path: Path) -> dict[str, Tensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise PlanError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}); download it again") from error
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise PlanError(f"{path} has a damaged safetensors header ({error}); download it again") from error
    if 8 + length + end > size:
        raise PlanError(f"{path} is truncated: it holds {size:,} of {8 + length + end:,} bytes; download it again")
    return tensors


def _tensor(entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, bits = tuple(entry["shape"]), _DTYPE_BITS.get(entry["dtype"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError("a shape or an offset is not a size")
    if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError("a tensor's shape and its bytes differ")
    return Tensor(shape, entry["dtype"], end - begin)
