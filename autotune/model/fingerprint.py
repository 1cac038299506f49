"""Which model a folder holds: the sha256 of every file that decides what is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config import mib
from .folder import GENERATION


def fingerprint(folder: Path, phase: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """A model folder as policy.ModelInfo has it: sha256 of every file that decides what is computed.

    Whole files are read, shards in parallel, once per run: about a second a GB, less than one load from the disk, and
    the file cache then holds them for the loads that follow. Blocks sampled from them would miss a changed byte.
    """
    weights = [*sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json", folder / "config.json"]
    tokenizer = [folder / name for name in _TEXT_FILES]
    paths = [path for path in weights + tokenizer if path.exists()]
    phase(f"hashing {folder.name}, {mib(sum(path.stat().st_size for path in paths))}")
    with ThreadPoolExecutor() as pool:
        files = {path.name: digest for path, digest in zip(paths, pool.map(_sha256, paths), strict=True)}
    both = [
        hashlib.sha256("".join(f"{files[p.name]}  {p.name}\n" for p in group if p.name in files).encode()).hexdigest()
        for group in (weights, tokenizer)
    ]
    return {
        "path": str(folder),
        "revision": _revision(folder),
        "weights_sha256": both[0],
        "tokenizer_sha256": both[1],
        "files": files,
    }


# what makes tokens of a text, and ends one
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _revision(folder: Path) -> str | None:
    """org/name@commit where the folder is a snapshot in a Hugging Face cache: models--org--name/snapshots/commit."""
    folder = folder.absolute()
    if folder.parent.name != "snapshots" or not (repository := folder.parents[1].name).startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name}"
