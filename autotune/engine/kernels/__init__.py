"""Triton alone, a file a kernel family; nothing else imports Triton, and who launches imports this when it does."""

from .delta import FEW, convolve, delta_rule, normalize_gated
from .int4 import _multiply as multiply
from .int4 import _unpack as unpack
from .int4 import assembly as weight_assembly
from .rows import normalize, rotate
from .slots import append, gather, store
from .split_kv import OVERLAPS
from .split_kv import _combine as combine
from .split_kv import _part as part
from .split_kv_int4 import _part_int4 as part_int4
from .split_kv_int4_long import ASSEMBLY as CODE_ASSEMBLY
from .split_kv_int4_long import _part_int4_long as part_int4_long

__all__ = [
    "CODE_ASSEMBLY",
    "FEW",
    "OVERLAPS",
    "append",
    "combine",
    "convolve",
    "delta_rule",
    "gather",
    "multiply",
    "normalize",
    "normalize_gated",
    "part",
    "part_int4",
    "part_int4_long",
    "rotate",
    "store",
    "unpack",
    "weight_assembly",
]
