"""What a run shows while it works: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..config import OBJECTIVES, Configuration, Objective, Record, mib
from ..search.watch import Watch
from .view import describe

UNITS: dict[Objective, str] = dict(zip(OBJECTIVES, ("tokens/s", "decode tokens/s", "first tokens/s"), strict=True))


class Display(Watch):
    """The trial, what is happening, the best so far per context, and the time left. Use as a context manager."""

    def __init__(self, console: Console, objective: Objective, timeout_s: float):
        self.console, self.objective, self.timeout_s = console, objective, timeout_s
        self.began = time.monotonic()
        self.measured = 0
        self.now = ""
        self.doing = "starting"
        self.open_share: float | None = None
        self.best: dict[int, Record] = {}
        self.live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def phase(self, text: str) -> None:
        self.doing = text
        if not self.console.is_terminal and not text.startswith("timing, round"):
            self._line(f"  {text}")

    def note(self, text: str) -> None:
        if text:
            self._line(text)

    def trial(self, configuration: Configuration, context: int, stage: str) -> None:
        self.now = f"{context} tokens: {describe(configuration)}"
        if not self.console.is_terminal:
            self._line(f"#{self.measured + 1} {stage} at {self.now}{self._open()}")

    def gain(self, open_share: float) -> None:
        """The share of the possible gain that is still open, as outlook.Outlook expects it."""
        self.open_share = open_share

    def record(self, record: Record) -> None:
        self.measured += 1
        known = self.best.get(record.context_tokens)
        if record.outcome == "ok" and (known is None or record.rate(self.objective) > known.rate(self.objective)):
            self.best[record.context_tokens] = record
        if not self.console.is_terminal:
            self._line(f"  -> {self._result(record)}")

    def _result(self, record: Record) -> str:
        if record.tokens_per_s is None:
            return f"{record.outcome}: {record.reason}"
        figures = f"{record.rate(self.objective):.1f} {UNITS[self.objective]}, {mib(record.peak_bytes or 0)}"
        if record.perplexity_ratio is not None:
            figures += f", perplexity {record.perplexity_ratio - 1:+.2%}"
        if record.task_f1 is not None:
            figures += f", task F1 {record.task_f1:.0%}"
        return figures if record.outcome == "ok" else f"{record.outcome}: {record.reason} ({figures})"

    def _open(self) -> str:
        return "" if self.open_share is None else f" ({self.open_share:.0%} of the gain open)"

    def _line(self, text: str) -> None:
        spent = int(time.monotonic() - self.began)
        self.console.print(
            f"[{spent // 60:02d}:{spent % 60:02d}] {text}", markup=False, highlight=False, soft_wrap=True
        )

    def _table(self) -> Table:
        spent = time.monotonic() - self.began
        left = max(0, int(self.timeout_s - spent))
        table = Table.grid(padding=(0, 1))
        table.add_row(
            Text(f"trial {self.measured + 1}", style="bold"), Text(self.now), Text(f"{left // 60}:{left % 60:02d} left")
        )
        table.add_row("", Text(f"{self.doing}{self._open()}", style="dim"))
        for context, record in sorted(self.best.items()):
            table.add_row(f"best at {context}", Text(f"{self._result(record)}  {describe(record.configuration)}"))
        return table
