"""What a run is asked for, who is told how it goes, and what can be said of it before anything starts."""

from __future__ import annotations

import json
import time
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from .config import MIB, Budget, Configuration, Record, Workload
from .demo import TARGET
from .model.folder import PlanError, check_folder
from .model.shape import ModelShape, read_shape
from .search.space import Space, read_space


class Watch:
    """Who is told how the run goes; this one says nothing of it."""

    def phase(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def trial(self, configuration: Configuration, context: int, stage: str) -> None: ...
    def record(self, record: Record) -> None: ...
    def gain(self, open_share: float) -> None: ...


@dataclass
class Request:
    """What a run is asked for: a model and a budget; all else has the defaults of `autotune run`.

    `model` and each of `drafts` is a folder as Hugging Face models come in. `space` is what `read_space` makes of a
    built-in search space's name or of a TOML file, and `space_name` what it is called. `out` is the run folder; without
    one it is results/MODEL-BUDGET. `storage` is any URL that Optuna takes; without one it is study.db in the run folder.
    """

    model: Path
    budget: Budget
    _: KW_ONLY
    drafts: list[Path] = field(default_factory=list)
    workload: Workload = field(default_factory=Workload)
    space: Space = field(default_factory=lambda: read_space("default"))
    space_name: str = "default"
    out: Path = None  # type: ignore[assignment] # filled in below
    timeout_s: float = 600  # of the whole run
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
        shapes[str(folder)] = read_shape(folder)
    target = shapes[str(request.model)]
    for draft in request.drafts:
        if shapes[str(draft)].vocab_size != target.vocab_size:
            raise PlanError(
                f"--draft {draft} has a vocabulary of {shapes[str(draft)].vocab_size} tokens, the model has "
                f"{target.vocab_size}: speculation needs a draft with the model's own tokenizer"
            )
        if None not in (words := (_vocabulary(request.model), _vocabulary(draft))) and words[0] != words[1]:
            raise PlanError(
                f"--draft {draft} has other tokens than the model: speculation needs a draft with the model's tokenizer"
            )
    longest = max(request.workload.contexts) + request.workload.new_tokens
    if target.max_position_embeddings and longest > target.max_position_embeddings:
        raise PlanError(
            f"--contexts {max(request.workload.contexts)} with --new-tokens {request.workload.new_tokens} needs "
            f"{longest} positions; the model has {target.max_position_embeddings}"
        )
    return shapes


def _vocabulary(folder: Path) -> Any:
    """Which token has which number; None where the folder has no tokenizer.json."""
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{folder / 'tokenizer.json'} cannot be read ({error}); download it again") from None
