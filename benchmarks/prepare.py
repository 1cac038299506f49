"""What a benchmark needs before it measures in workers as a run does: the models, the device, the text that is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from autotune.config import Budget, Workload
from autotune.demo import DRAFT, TARGET
from autotune.trial.inputs import Inputs, text_file
from autotune.trial.process import WorkerFailed, WorkerProcess
from autotune.trial.trials import Trials

UNLIMITED = 10**13  # bytes, more than any machine has: under no budget
HOPELESS = 1e12  # tokens/s that nothing reaches: one round is enough
INPUTS_S = 300  # seconds, as a run allows for reading a text and cutting it

_FOLDER = click.Path(path_type=Path, exists=True)
model_option = click.option("--model", type=_FOLDER, help="a model folder; else the bundled pair")
draft_option = click.option("--draft", type=_FOLDER, help="its draft; else there is none")
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu or cuda:0",
    callback=lambda context, option, word: "cuda:0" if word == "cuda" else word,
)


def pair_of(model: Path | None, draft: Path | None) -> tuple[Path, Path | None]:
    """The model and draft that were asked for; without a model, the bundled pair."""
    return (model, draft) if model else (TARGET, DRAFT)


@contextmanager
def uncapped(trials: Trials) -> Iterator[WorkerProcess]:
    """A worker that the budget does not bind, for what is prepared; it ends with the block."""
    worker = trials.uncapped()
    try:
        yield worker
    finally:
        worker.kill()


@contextmanager
def unscored(model: Path, workload: Workload, budget: Budget, folder: Path) -> Iterator[tuple[Trials, str]]:
    """Trials on the workload's text without a reference, so that no quality is measured; and the full precision here.

    Raises click.UsageError where the text cannot be used.
    """
    tokens = str(folder / "inputs.npz")
    with Trials(str(model), workload, budget, folder) as trials:
        try:
            with uncapped(trials) as worker:
                precision = worker.request("environment", 120)["full_precision"]
                worker.request(
                    "inputs",
                    INPUTS_S,
                    model=str(model),
                    text=str(text_file(workload, folder)),
                    prompts=workload.prompts,
                    contexts=list(workload.contexts),
                    windows=1,  # is cut and not scored
                    path=tokens,
                )
        except WorkerFailed as failure:
            raise click.UsageError(failure.reason) from None
        trials.inputs = Inputs(tokens, {})
        yield trials, precision
