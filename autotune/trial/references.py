"""Reference logits that an earlier run scored, kept in a cache folder of limited size.

A file is named by what decides its content. It is a line with the sha256 of all that follows, a line of JSON (what
scoring told) and the array as numpy saves it. The folder is only ever a help: what cannot be read is scored again, and
where nothing can be written nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

LIMIT = 2 * 10**9  # bytes, chosen; the files that were used least recently go first
_SUFFIX = ".reference"


def folder() -> Path:
    """AUTOTUNE_CACHE, or autotune/references in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("AUTOTUNE_CACHE") or Path(caches, "autotune", "references"))


def name(facts: dict[str, Any]) -> str:
    """The file of the logits that these JSON facts decide."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() + _SUFFIX


def fetch(name: str, to: Path) -> dict[str, Any] | None:
    """Copy the array to `to` and return what `keep` was told; None where there is none that is whole."""
    path = folder() / name
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    rest = memoryview(content)[65:]
    if hashlib.sha256(rest).hexdigest().encode() != content[:64]:
        return None
    begin = content.index(b"\n", 65) + 1
    to.write_bytes(memoryview(content)[begin:])
    told: dict[str, Any] = json.loads(content[65:begin])
    return told


def keep(name: str, array: Path, told: dict[str, Any]) -> None:
    """Store the array's file with what is told of it, and let the oldest go where that is too much."""
    data = array.read_bytes()
    line = json.dumps(told).encode() + b"\n"
    if len(data) + len(line) > LIMIT:
        return
    digest = hashlib.sha256(line)
    digest.update(data)
    temporary = folder() / f"{name}.{os.getpid()}{_SUFFIX}"
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines([digest.hexdigest().encode() + b"\n", line, data])
            temporary.replace(folder() / name)
        finally:
            temporary.unlink(missing_ok=True)
        _trim()


def _trim() -> None:
    stats = {path: path.stat() for path in folder().glob(f"*{_SUFFIX}")}
    held = sum(stat.st_size for stat in stats.values())
    for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
        if held <= LIMIT:
            return
        path.unlink(missing_ok=True)
        held -= stats[path].st_size
