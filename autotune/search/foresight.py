"""What the plan foretells of a configuration, corrected by the peaks that were measured so far."""

from __future__ import annotations

import dataclasses

from ..config import Budget, Configuration, Record, mib
from ..model.calibration import DEFAULT, Calibration, calibrate, predict
from ..model.footprint import Prediction
from ..model.shape import ModelShape

_LEARNT = 4  # measured peaks from which on the plan is calibrated; chosen, not measured
# Times more peaks, after which it is calibrated again, as that takes time that grows with their square; chosen, to do
# so less often than after every record (benchmarks/LOG.md, "The search on a recorded sweep of the bundled pair").
_GROWN = 1.1
# Relative error of the plan that is allowed for before it has shown its own, and at most; chosen. The 95th percentile
# before calibration was 1.4 to 5.0 % since (benchmarks/LOG.md, "Predicting the footprint").
_UNTRIED = 0.07


class Foresight:
    """What the plan says of a configuration, calibrated by what was measured so far."""

    def __init__(self, model: str, shapes: dict[str, ModelShape], budget: Budget, new_tokens: int, base_bytes: int):
        """`shapes` by folder, the `model`'s and the drafts'; `base_bytes` is what a process holds before it loads."""
        self.model, self.shapes, self.budget, self.new_tokens = model, shapes, budget, new_tokens
        self.default = DEFAULT[budget.device.partition(":")[0]]
        self.untaught = self.calibration = dataclasses.replace(self.default, base_bytes=base_bytes)
        self.pairs: list[tuple[Record, Prediction]] = []
        self.fitted = 0  # of the pairs, so many are in the calibration
        self.formulas: dict[tuple[Configuration, int], Prediction] = {}

    def learn(self, record: Record, new_tokens: int | None = None) -> None:
        """A measured peak corrects the predictions that follow."""
        if record.peak_bytes is None:
            return
        prediction = self._predict(record.configuration, record.context_tokens, self.default, new_tokens)
        self.pairs.append((record, prediction))
        if len(self.pairs) >= max(_LEARNT, _GROWN * self.fitted):
            self.fitted = len(self.pairs)
            self.calibration = calibrate(self.pairs, self.budget.device)

    def predicted(self, configuration: Configuration, context: int) -> int:
        """The footprint in bytes as the formulas have it, before anything is learnt."""
        return self._formula(configuration, context).total

    def step_bytes(self, configuration: Configuration, context: int) -> float:
        """What a decode step reads, in bytes."""
        return self._formula(configuration, context).decode_floor_s or 0.0

    def _formula(self, configuration: Configuration, context: int) -> Prediction:
        pair = configuration, context
        if pair not in self.formulas:
            self.formulas[pair] = self._predict(configuration, context, self.untaught, bandwidth=1.0)
        return self.formulas[pair]

    def fits(self, configuration: Configuration, context: int) -> str:
        """Why it cannot fit, or nothing where it may: the prediction's own error is given away."""
        predicted = self._predict(configuration, context, self.calibration).total
        error = _UNTRIED if self.calibration.error is None else min(_UNTRIED, max(0.01, self.calibration.error))
        if predicted * (1 - error) <= self.budget.bytes:
            return ""
        return f"predicted {mib(predicted)}, over the budget of {mib(self.budget.bytes)}"

    def _predict(
        self,
        configuration: Configuration,
        context: int,
        calibration: Calibration,
        new_tokens: int | None = None,
        bandwidth: float | None = None,
    ) -> Prediction:
        return predict(
            self.shapes[self.model],
            self.shapes.get(configuration.draft),
            configuration,
            context,
            new_tokens or self.new_tokens,
            self.budget.device,
            calibration,
            bandwidth,
        )
