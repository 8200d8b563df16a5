"""Progress of a prediction: a bar in a terminal, one line a case everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from fedcmt.display import duration_text, is_interactive


class CaseProgress:
    """Plain lines, one a finished case.

    Args:
        total: Cases in all.
        stream: Where to write, standard output by default.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stdout if stream is None else stream
        self._done = 0
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def advance(self, case: str, fraction: float) -> None:
        """This part of a case has been through the network."""

    def finished(self, case: str, error: BaseException | None) -> None:
        """A case is written, or given up."""
        self._done += 1
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        outcome = f"written after {duration_text(seconds)}" if error is None else "skipped"
        self._note(f"case {self._done}/{self._total}  {case}  {outcome}")

    def _note(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveCaseProgress(CaseProgress):
    """A bar over all cases that moves with every tile."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        super().__init__(total, stream)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(file=self._stream, highlight=False))
        self._task = self._bar.add_task("reading", total=total)
        self._begun: set[str] = set()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, case: str, fraction: float) -> None:
        """Move the bar by a part of a case."""
        self._begun.add(case)
        self._bar.update(self._task, completed=len(self._begun) - 1 + fraction, description=case)

    def finished(self, case: str, error: BaseException | None) -> None:
        """A case is written, or given up."""
        self._begun.add(case)
        super().finished(case, error)

    def _note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)


def open_progress(total: int, stream: TextIO | None = None) -> CaseProgress:
    """The progress that suits a stream: a bar in a terminal, else plain lines."""
    target = sys.stdout if stream is None else stream
    return LiveCaseProgress(total, target) if is_interactive(target) else CaseProgress(total, target)
