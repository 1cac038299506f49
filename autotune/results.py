"""The study storage as records and as a DataFrame: the one truth that CSV, pictures and policy are derived from."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Budget, Configuration, Record, Workload

if TYPE_CHECKING:
    import pandas as pd

RECORD = "record"  # the trial attribute that holds a record


class RunError(ValueError):
    """A run folder or storage that cannot be used; the message says what to do."""


def open_storage(url: str) -> Any:
    """An Optuna storage. Raises RunError where it cannot be opened."""
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.storages.get_storage(url)
    except (sqlalchemy.exc.SQLAlchemyError, ValueError, RuntimeError, ImportError, OSError) as error:
        raise RunError(f"the storage {url} cannot be opened: {str(error).splitlines()[0]}; check --storage") from error


def read_records(url: str, name: str) -> list[Record]:
    """Every record of a run, in the order in which they were measured."""
    storage = open_storage(url)
    found = []
    for study in storage.get_all_studies():
        if not study.study_name.startswith(name + "/"):
            continue
        for trial in storage.get_all_trials(study._study_id, deepcopy=False):
            if RECORD in trial.user_attrs:
                found.append((trial.datetime_start, trial.user_attrs[RECORD]))
    return [Record.from_json(json.loads(text)) for _, text in sorted(found, key=lambda item: (item[0], item[1]))]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder: its inputs as `run.json` has them, and its records."""

    folder: Path
    info: dict[str, Any]
    records: list[Record]

    @property
    def workload(self) -> Workload:
        stored = self.info["workload"]
        return Workload(**{**stored, "contexts": tuple(stored["contexts"])})

    @property
    def budget(self) -> Budget:
        return Budget(**self.info["budget"])


def read_info(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises RunError for a folder that holds no run."""
    try:
        info = json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        raise RunError(f"{folder} holds no run.json: give the folder that autotune run wrote (--out)") from None
    except OSError as error:
        raise RunError(f"{folder / 'run.json'} cannot be read: {error.strerror}; check --out") from None
    except ValueError as error:
        raise RunError(f"{folder / 'run.json'} is not valid JSON ({error}): give another folder with --out") from None
    needed = ("workload", "budget", "study", "storage", "identity")
    missing = [key for key in needed if not isinstance(info, dict) or key not in info]
    if missing:
        raise RunError(f"{folder / 'run.json'} has no {missing[0]}: give the folder that autotune run wrote (--out)")
    return info  # type: ignore[no-any-return]


def has_ended(info: dict[str, Any]) -> bool:
    """Whether the run came to its end, which leaves what it chose."""
    return "choice" in info


def read_run(folder: Path) -> Run:
    """Raises RunError for a folder that holds no run."""
    info = read_info(folder)
    if info["storage"] is None and not (folder / "study.db").exists():
        raise RunError(f"{folder} holds no study.db, so nothing that was measured")
    return Run(folder, info, read_records(storage_url(folder, info), info["study"]))


def storage_url(folder: Path, info: dict[str, Any]) -> str:
    """The run's storage; a run folder that was moved still finds its own study.db."""
    return info["storage"] or f"sqlite:///{folder.resolve() / 'study.db'}"


def frame(records: list[Record]) -> pd.DataFrame:
    """A row per measured (configuration, context), as in trials.csv."""
    import pandas as pd

    rows = [_row(record) for record in records]
    return pd.DataFrame(rows, columns=None if rows else list(_row(Record(Configuration(), 0, "ok"))))


def _row(record: Record) -> dict[str, Any]:
    skipped = {"configuration", "samples", "memory", "quality", "machine", "outcome", "reason", "context_tokens"}
    row: dict[str, Any] = {"context_tokens": record.context_tokens, "outcome": record.outcome}
    row |= {"reason": record.reason, **dataclasses.asdict(record.configuration)}
    for name in (field.name for field in dataclasses.fields(Record) if field.name not in skipped):
        value = getattr(record, name)
        if name.endswith("_interval"):
            row[name.replace("_interval", "_low")] = value[0] if value else None
            row[name.replace("_interval", "_high")] = value[1] if value else None
        else:
            row[name] = value
    return row | {f"memory_{owner}_bytes": size for owner, size in record.memory.items()}
