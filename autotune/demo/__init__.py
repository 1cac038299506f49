"""The bundled pair of models and the text that both are judged by.

`TARGET` and `DRAFT` are complete Hugging Face model folders that share one tokenizer. They were trained on Python
source (see README.md beside this file), but on none of `held_out_text()`, which every machine with Python already has.
"""

import sysconfig
import tokenize
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

__all__ = ["DRAFT", "TARGET", "held_out_text", "is_held_out"]

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"

# Besides tests and other people's packages: lib2to3 and idlelib are not installed everywhere, encodings are tables.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}


def is_held_out(name: str) -> bool:
    """Whether the standard library's document of this name is kept from training: one in twenty, by its hash."""
    return int(sha256(name.encode()).hexdigest(), 16) % 20 == 0


def held_out_text() -> str:
    """The held-out modules and help topics of this Python's standard library, in order of their names.

    About 0.5 MB; each document starts with a line `### name`. The text depends on the Python version.
    """
    return "".join(document(name, text) for name, text in standard_library() if is_held_out(name))


def document(name: str, text: str) -> str:
    """One document as training and evaluation see it."""
    return f"### {name}\n\n{text.strip()}\n\n"


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every module in source form and of every help topic, in order of their names."""
    from pydoc_data.topics import topics  # half a megabyte: only when it is asked for

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {module_name(path.relative_to(root)): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        parts = name.split(".")
        if _SKIPPED.isdisjoint(parts) and all(map(str.isidentifier, parts)) and _is_written_by_hand(name):
            with tokenize.open(paths[name]) as file:
                text = file.read()
            if text.strip():
                yield name, text
    for topic in sorted(topics):
        yield f"topic {topic}", topics[topic]


def module_name(path: Path) -> str:
    """`json/__init__.py` is `json`, `json/decoder.py` is `json.decoder`."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _is_written_by_hand(name: str) -> bool:
    """Topics are documents of their own; the build's configuration differs from machine to machine."""
    return name != "pydoc_data.topics" and not name.startswith("_sysconfigdata")
