"""What a run is asked for, who is told how it goes, and what can be said of it before anything starts."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from .config import MIB, Budget, Workload, mib
from .demo import TARGET
from .model.calibration import DEFAULT, cheapest
from .model.folder import CONFIG, PlanError, check_folder
from .model.refused import check_type, word_refusals
from .model.shape import ModelShape, read_shape
from .model.tokenizer import check_texts, check_tokenizer, vocabulary
from .search.space import Space, read_space


@dataclass
class Request:
    """What a run is asked for: a model and a budget; all else has the defaults of `autotune run`.

    `model` and each of `drafts` is a folder as Hugging Face models come in. `space` is what `read_space` makes of a
    built-in search space's name or of a TOML file, and `space_name` what it is called. `out` is the run folder; without
    one it is results/MODEL-BUDGET. `storage` is any URL that Optuna takes; without one study.db in the run folder.
    """

    model: Path
    budget: Budget
    _: KW_ONLY
    drafts: list[Path] = field(default_factory=list)
    workload: Workload = field(default_factory=Workload)
    space: Space = field(default_factory=lambda: read_space("default"))
    space_name: str = "default"
    out: Path = None  # type: ignore[assignment] # filled in below
    timeout_s: float = 780  # of the whole run
    trials: int | None = None  # measurements of the search, at most
    storage: str | None = None
    reloads: bool = False  # whether each context may have a load group of its own
    seed: int = 0
    warm_start: bool = True  # whether to learn from finished runs in the folders beside `out`
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.out is None:
            name = "demo" if self.model == TARGET else self.model.name
            self.out = Path("results") / f"{name}-{round(self.budget.bytes / MIB)}MiB"

    @property
    def study(self) -> str:
        return f"autotune-{self.out.name}"


def check_inputs(request: Request) -> dict[str, ModelShape]:
    """Shapes of the target and of every draft, checked before anything starts. Raises PlanError."""
    shapes = {}
    for folder in [request.model, *request.drafts]:
        check_folder(folder)
        check_type(folder)
        shapes[str(folder)] = read_shape(folder)
    target = shapes[str(request.model)]
    check_tokenizer(request.model)
    given = {f"--{name}": getattr(request.workload, name) for name in ("text", "prompts", "task")}
    check_texts(request.model, target.vocab_size, {option: path for option, path in given.items() if path})
    for draft in request.drafts:
        words, rows = (vocabulary(request.model), vocabulary(draft)), shapes[str(draft)].vocab_size
        if None in words and rows != target.vocab_size:  # nothing says that they differ in padding only
            raise PlanError(
                f"--draft {draft} has a vocabulary of {rows} tokens, the model has {target.vocab_size}, and without a "
                "tokenizer.json in both folders nothing says that the tokens are the same: put it there"
            )
        if None not in words and words[0] != words[1]:
            raise PlanError(
                f"--draft {draft} has other tokens than the model: speculation needs a draft with the model's tokenizer"
            )
    longest = max(request.workload.contexts) + request.workload.new_tokens
    if target.max_position_embeddings and longest > target.max_position_embeddings:
        raise PlanError(
            f"--contexts {max(request.workload.contexts)} with --new-tokens {request.workload.new_tokens} needs "
            f"{longest} positions; the model has {target.max_position_embeddings}, by max_position_embeddings and the "
            f"rope scaling of {request.model / CONFIG}"
        )
    return shapes


class NothingFits(Exception):
    """No configuration fits the budget; the message says by how much and what would."""


def check_budget(request: Request, shapes: dict[str, ModelShape]) -> None:
    """Raises NothingFits where even the smallest prediction is over the budget."""
    kind = "cpu" if request.budget.device == "cpu" else "cuda"
    alone = {**request.space.choices, "draft": ("none",), "attention": request.space.choices["attention"][:1]}
    space = dataclasses.replace(request.space, choices=alone).restrict(
        device=request.budget.device,
        full_precision="bf16",
        drafts=[],
        sliding=any(layer.window for layer in shapes[str(request.model)].layers),
        quantized=shapes[str(request.model)].prequantized,
        failed={},
        refused=word_refusals(shapes[str(request.model)]),
    )
    configuration, context, prediction = cheapest(
        shapes[str(request.model)],
        {},
        list(space.configurations()),
        [min(request.workload.contexts)],
        request.workload.new_tokens,
        request.budget.device,
        DEFAULT[kind],
    )
    least = int(prediction.total * 0.95)  # what the prediction's own error leaves open
    if least > request.budget.bytes:
        raise NothingFits(
            f"--budget {mib(request.budget.bytes)} is {mib(least - request.budget.bytes)} under the smallest predicted "
            f"footprint: {configuration.weights} weights, {configuration.cache} cache at {context} tokens need about "
            f"{mib(prediction.total)}"
        )
