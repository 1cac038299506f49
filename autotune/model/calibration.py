"""What measurement corrects: footprints predicted by the formulas and by what records say of them.

`calibrate` learns from records what the physics leaves out. All sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import MIB, Budget, Configuration, Record
from .footprint import Prediction, footprint
from .shape import ModelShape
from .speed import decode_floor_s


@dataclass(frozen=True)
class Calibration:
    """What the process holds before any weight, and what measurement added to the formulas.

    To what the formulas say are added the `share` of cache and activations that they missed, the same for all, and by
    words of the configuration (see `_keys`) an offset in bytes; the sum is raised by a share of itself, which covers
    every record and the `SPREAD` of the next one. `corrections` holds those two. `error` is the relative error of
    `total` (95th percentile) on records that were left out of the fit; None where there were none.
    """

    base_bytes: int
    share: float = 0.0
    corrections: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: float | None = None


# A CUDA context, as run.json in benchmarks/recorded/run-8b-* has it of an H200; Python with torch, 381 MiB in
# benchmarks/recorded/plan-error-cpu/zen.txt.
DEFAULT = {"cuda": Calibration(610 * MIB), "cpu": Calibration(380 * MIB)}
# How far above all records of its kind, as a share of itself, the next may lie: a heap varies more than CUDA's pool.
# Chosen: on a Zen 5 one request's peaks vary by 1 % (benchmarks/LOG.md, "Predicting the footprint"); CUDA's were not
# measured so.
SPREAD = {"cuda": 0.005, "cpu": 0.01}
_COMPLETED = ("ok", "quality_loss", "wrong_output", "unstable")  # their peaks were not cut short


def predict(
    target: ModelShape,
    draft: ModelShape | None,
    configuration: Configuration,
    context: int,
    new_tokens: int,
    device: str,
    calibration: Calibration,
    bandwidth: float | None = None,
) -> Prediction:
    """The footprint at `context` prompt tokens and `new_tokens` more; `bandwidth` is the memory's, bytes per second."""
    said = footprint(target, draft, configuration, context, new_tokens, device, calibration.base_bytes)
    owners = dict(said.owners)
    fixed = said.total - owners["activations"] - owners["slack"]
    corrected = _corrected(calibration, _keys(configuration), said.total, _moving(said))
    movable = max(0, round(corrected) - fixed)  # a negative correction takes from these two
    owners["activations"] = min(owners["activations"], movable)
    owners["slack"] = movable - owners["activations"]
    floor = decode_floor_s(target, configuration, context, new_tokens, bandwidth) if bandwidth else None
    return dataclasses.replace(said, owners=owners, decode_floor_s=floor)


def calibrate(pairs: Iterable[tuple[Record, Prediction]], device: str) -> Calibration:
    """Learns corrections from records and what `predict` said of them with `DEFAULT`, all of one machine and workload.

    Afterwards no record's prediction is below its measured peak. Records that failed are not used.
    """
    kind = device.partition(":")[0]
    kept = [_point(r, p) for r, p in pairs if r.outcome in _COMPLETED and r.peak_bytes]
    fitted = _fit(kept, kind)
    errors = []
    for i, point in enumerate(kept if len(kept) > 1 else ()):
        others = _fit(kept[:i] + kept[i + 1 :], kind, point.keys)
        whole = point.predicted + others.base_bytes - DEFAULT[kind].base_bytes
        errors.append(abs(_corrected(others, point.keys, whole, point.moving) / point.peak - 1))
    return dataclasses.replace(fitted, error=_high(errors) if errors else None)


class _Point(NamedTuple):
    """A record beside what was predicted of it, in bytes."""

    keys: tuple[str, ...]
    moving: int
    predicted: int
    peak: int
    base: int  # 0 where it was not measured


def _point(record: Record, prediction: Prediction) -> _Point:
    keys, moving = _keys(record.configuration), _moving(prediction)
    return _Point(keys, moving, prediction.total, record.peak_bytes or 0, record.base_bytes or 0)


def _keys(configuration: Configuration) -> tuple[str, ...]:
    """The words that a correction is kept under, the most specific first; the last stands for all configurations."""
    c = configuration
    return f"{c.weights} {c.launch}{' draft' if c.has_draft_model else ''}", c.weights, ""


def _moving(prediction: Prediction) -> int:
    return sum(prediction.owners[owner] for owner in ("kv_cache", "draft_kv_cache", "activations"))


def _fit(points: Sequence[_Point], kind: str, wanted: tuple[str, ...] | None = None) -> Calibration:
    """Without the error; only the corrections under the `wanted` keys where those are given."""
    default = DEFAULT[kind].base_bytes
    base = max((point.base for point in points if point.base), default=default)
    kinds: dict[str, list[tuple[int, int, int]]] = {}  # the moving bytes, the whole prediction and the truth
    for point in points:
        figures = point.moving, point.predicted + base - default, point.peak
        for key in point.keys:
            if " " in key or wanted is None or key in wanted:
                kinds.setdefault(key, []).append(figures)
    share = _common_share([like for key, like in kinds.items() if " " in key])
    corrections = {}
    for key, like in kinds.items():
        if wanted is None or key in wanted:
            offset = sum(peak - said - share * moving for moving, said, peak in like) / len(like)
            above = max(peak / max(1.0, said + share * moving + offset) for moving, said, peak in like)
            corrections[key] = offset, above - 1 + SPREAD[kind]
    return Calibration(base, share, corrections)


def _common_share(kinds: Sequence[Sequence[tuple[int, int, int]]]) -> float:
    """The slope of what was missed over the moving bytes: least squares with an offset for every kind."""
    products = squares = 0.0
    for points in kinds:
        mean = sum(moving for moving, _, _ in points) / len(points)
        products += sum((moving - mean) * (peak - said) for moving, said, peak in points)
        squares += sum((moving - mean) ** 2 for moving, _, _ in points)
    return min(max(products / squares, -0.5), 1.0) if squares else 0.0  # predictions keep rising with the context


def _high(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def _corrected(calibration: Calibration, keys: tuple[str, ...], said: int, moving: int) -> float:
    offset, above = next((calibration.corrections[key] for key in keys if key in calibration.corrections), (0.0, 0.0))
    return (said + calibration.share * moving + offset) * (1 + above)


def largest_context(
    target: ModelShape,
    draft: ModelShape | None,
    configuration: Configuration,
    new_tokens: int,
    budget: Budget,
    calibration: Calibration,
) -> int:
    """The longest prompt (tokens) whose footprint fits the budget and the model's positions; 0 where none does."""

    def fits(context: int) -> bool:
        found = predict(target, draft, configuration, context, new_tokens, budget.device, calibration)
        return found.total <= budget.bytes

    low, high = 0, (target.max_position_embeddings or 2**20) - new_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return max(low, 0)


def cheapest(
    target: ModelShape,
    drafts: Mapping[str, ModelShape],
    configurations: Iterable[Configuration],
    contexts: Sequence[int],
    new_tokens: int,
    device: str,
    calibration: Calibration,
) -> tuple[Configuration, int, Prediction]:
    """The smallest footprint among configurations and contexts; `drafts` maps a configuration's draft to its shape."""

    candidates = (
        (c, context, predict(target, drafts.get(c.draft), c, context, new_tokens, device, calibration))
        for c in configurations
        for context in contexts
    )
    return min(candidates, key=lambda candidate: candidate[2].total)
