"""How GPTQ and AWQ checkpoints pack their layers in 4 bits: what config.json says of it, and the shapes that follow.

A weight is (code - zero) * scale, with a scale and a zero per output feature and group of `group_size` inputs. A layer
of `out` x `inp` weights is stored as the tensors PARTS, eight 4-bit numbers to an int32, the lowest bits first:

- GPTQ (Frantar et al., arXiv 2210.17323), as AutoGPTQ and GPTQModel write it: `qweight` [inp / 8, out], packed along
  the input; `qzeros` [groups, out / 8]; `scales` [groups, out]; with `desc_act`, `g_idx` [inp], each input's group. The
  format `gptq` stores words that are 0x11111111 less than the zeros', `gptq_v2` the zeros themselves.
- AWQ (Lin et al., arXiv 2306.00978), as AutoAWQ's version `gemm` writes it: `qweight` [inp, out / 8] and `qzeros`
  [groups, out / 8], both packed along the output in the order AWQ_ORDER; `scales` [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

BITS = 4  # of a code: of GPTQ's and AWQ's formats the only width that is read
PER_WORD = 8  # codes in an int32
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Weights along the input that share a scale, the most, in quanto's qint4 (optimum.quanto.nn) and in our own layer.
QUANTO_GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: the output, of eight, that each half byte of a word belongs to


class UnreadablePacking(ValueError):
    """A quantization_config that the engine does not read; the message names the key."""


class Packing(NamedTuple):
    """One checkpoint's way of storing its layers; `group_size` is None where a whole row shares its scale."""

    method: str
    group_size: int | None
    desc_act: bool = False
    less_one: bool = False  # zeros are stored as GPTQ's first format has them

    def group(self, inp: int) -> int:
        return self.group_size or inp

    def shapes(self, out: int, inp: int) -> dict[str, tuple[int, int]]:
        """Of a layer's packed tensors. Raises UnreadablePacking for a layer that cannot be packed."""
        if out % PER_WORD or inp % PER_WORD or inp % self.group(inp):
            raise UnreadablePacking(f"a layer of {out} x {inp} weights has no whole groups of {self.group(inp)} inputs")
        groups = inp // self.group(inp)
        words = (inp // PER_WORD, out) if self.method == "gptq" else (inp, out // PER_WORD)
        return {"qweight": words, "qzeros": (groups, out // PER_WORD), "scales": (groups, out)}

    def size(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """`out` and `inp` of the layer whose `qweight` has this shape."""
        rows, columns = qweight
        return (columns, rows * PER_WORD) if self.method == "gptq" else (columns * PER_WORD, rows)


def read_packing(quantization: object) -> Packing | None:
    """What a config.json's `quantization_config` says; None where it is neither GPTQ's nor AWQ's.

    Raises UnreadablePacking for their variants that the engine does not read.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") not in ("gptq", "awq"):
        return None
    method = str(quantization["quant_method"])
    bits, group_size = quantization.get("bits", BITS), quantization.get("group_size", 128)
    if bits != BITS:
        raise UnreadablePacking(f"quantization_config.bits is {bits!r}: {method} checkpoints are read in 4 bits only")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise UnreadablePacking(f"quantization_config.group_size is {group_size!r}, neither a size nor -1")
    key, stored = _format(
        quantization, *(("checkpoint_format", "format") if method == "gptq" else ("version", "format"))
    )
    known = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    if (stored or known[0]) not in known:
        raise UnreadablePacking(f"quantization_config.{key} is {stored!r}; of {method} only {', '.join(known)} is read")
    if method == "awq" and quantization.get("backend") == "llm-awq":
        raise UnreadablePacking("quantization_config.backend is 'llm-awq'; of awq only gemm is read")
    if method == "awq" and quantization.get("zero_point", True) is not True:
        raise UnreadablePacking("quantization_config.zero_point is false; of awq only checkpoints with zeros are read")
    group = None if group_size == -1 else group_size
    return Packing(method, group, quantization.get("desc_act") is True, method == "gptq" and stored != "gptq_v2")


def _format(quantization: Mapping[str, Any], *keys: str) -> tuple[str, str | None]:
    """The first of `keys` that is set, and its value in lower case."""
    for key in keys:
        if quantization.get(key) is not None:
            return key, str(quantization[key]).lower()
    return keys[0], None
