"""Progress of a federation, for a terminal and for plain output.

``open_display`` picks one of two displays with the same methods. In a terminal a table of the clients and a bar with
the time left stay at the bottom while notes and log lines scroll above them. Everywhere else (a pipe, a log file, a
continuous-integration job) the same facts come as plain lines: one per client and round, one per round.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Clock = Callable[[], float]

REFRESHES_PER_SECOND = 4
SECONDS_BETWEEN_STEP_LINES = 60.0
ROUNDS_IN_ESTIMATE = 5
# Below these an extrapolation from the first steps is mostly start-up cost.
MIN_SECONDS_FOR_ESTIMATE = 2.0
MIN_FRACTION_FOR_ESTIMATE = 0.02


class Display(Protocol):
    """What the round loop tells its audience. Every display is a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        """Show one line of information."""

    def round_started(self, round_index: int, clients: Sequence[str]) -> None:
        """Announce round `round_index` (1 for the first) and the clients invited to it."""

    def step(self, client: str, step: int, steps: int, loss: float) -> None:
        """Report that `client` finished local step `step` (1 for the first) of `steps`."""

    def client_finished(self, line: Mapping[str, Any]) -> None:
        """Report a client's line of ``metrics.jsonl``."""

    def round_finished(self, line: Mapping[str, Any]) -> None:
        """Report the server's line of ``metrics.jsonl``."""


def open_display(
    rounds: int, clients: Sequence[str], *, first_round: int = 1, stream: TextIO | None = None
) -> PlainDisplay | LiveDisplay:
    """Returns the display that suits `stream`.

    Args:
        rounds: Rounds of the whole federation, those of earlier runs included.
        clients: Names of all clients.
        first_round: First round of this run; above 1 when a run is resumed.
        stream: Where to write, standard output by default.

    Returns:
        A live table when `stream` is a terminal, else plain lines. ``NO_COLOR``, ``CI`` and ``TERM=dumb`` ask for
        plain lines as well.
    """
    stream = sys.stdout if stream is None else stream
    pace = Pace(rounds, first_round)
    return LiveDisplay(pace, clients, stream) if is_interactive(stream) else PlainDisplay(pace, clients, stream)


def is_interactive(stream: TextIO) -> bool:
    """Whether a stream is a terminal in which lines can be drawn over."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    return stream.isatty()


@dataclass
class Pace:
    """How long rounds take, and how long the rest will.

    Finished rounds give the estimate; until there is one, the share of local steps done in the first round does.
    """

    rounds: int
    first_round: int = 1
    clock: Clock = time.monotonic
    round_index: int = field(init=False, default=0)
    _started: float = field(init=False)
    _round_started: float | None = field(init=False, default=None)
    _durations: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=ROUNDS_IN_ESTIMATE))
    _fractions: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the display was opened."""
        return self.clock() - self._started

    @property
    def rounds_done(self) -> float:
        """Finished rounds, with the running one counted by its share of local steps."""
        if self.round_index == 0:
            return self.first_round - 1
        return self.round_index - 1 + self._fraction() if self._round_started is not None else self.round_index

    def start_round(self, round_index: int, clients: Sequence[str]) -> None:
        self.round_index = round_index
        self._round_started = self.clock()
        self._fractions = dict.fromkeys(clients, 0.0)

    def step(self, client: str, step: int, steps: int) -> None:
        self._fractions[client] = min(step / steps, 1.0) if steps > 0 else 1.0

    def finish_round(self) -> float:
        """Ends the running round and returns its seconds."""
        seconds = 0.0 if self._round_started is None else self.clock() - self._round_started
        self._durations.append(seconds)
        self._round_started = None
        return seconds

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last round is done, or None while there is nothing to go by."""
        running = 0.0 if self._round_started is None else self.clock() - self._round_started
        if self._durations:
            usual = sum(self._durations) / len(self._durations)
        elif running >= MIN_SECONDS_FOR_ESTIMATE and self._fraction() >= MIN_FRACTION_FOR_ESTIMATE:
            usual = running / self._fraction()
        else:
            return None
        left = (self.rounds - self.round_index) * usual
        return left if self._round_started is None else left + max(usual - running, 0.0)

    def _fraction(self) -> float:
        return sum(self._fractions.values()) / len(self._fractions) if self._fractions else 0.0


def duration_text(seconds: float) -> str:
    """Returns `seconds` as people say it: ``41 s``, ``3 min 25 s``, ``2 h 05 min``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def _score(line: Mapping[str, Any], stage: str) -> str:
    return _number((line.get(stage) or {}).get("score"))


def client_text(line: Mapping[str, Any]) -> str:
    """Returns the sentence of a client's ``metrics.jsonl`` line."""
    parts = []
    if line.get("refused"):
        parts.append(f"update refused: {line['refused']}")
    elif line.get("phase") == "warm-up":
        parts.append("warming up")
    elif not line.get("participated", True):
        parts.append("did not take part")
    if line.get("train_loss") is not None:
        parts.append(f"loss {_number(line['train_loss'])}")
    stages = [stage for stage in ("local", "aggregated") if line.get(stage)]
    if stages:
        scores = [f"{_score(line, stage)} {stage}" for stage in stages]
        if line.get("best"):
            scores.append(f"best {_score(line, 'best')} (round {line['best'].get('round', '–')})")
        metric = str(line[stages[0]].get("metric", "score")).replace("_", " ")
        parts.append(f"{metric} {', '.join(scores)}")
    return "  ".join(parts) or "nothing to report"


def round_text(pace: Pace, seconds: float, line: Mapping[str, Any]) -> str:
    """Returns the sentence that closes a round."""
    text = f"round {line.get('round', pace.round_index)}/{pace.rounds} done in {duration_text(seconds)}"
    left = pace.seconds_left()
    if pace.round_index < pace.rounds and left is not None:
        return f"{text}, about {duration_text(left)} left"
    return f"{text}, {duration_text(pace.elapsed)} in all"


class PlainDisplay:
    """Plain lines, flushed one by one; a long round also shows a step now and then."""

    def __init__(self, pace: Pace, clients: Sequence[str], stream: TextIO) -> None:
        self._pace = pace
        self._stream = stream
        self._width = max((len(name) for name in clients), default=0)
        self._lock = threading.Lock()
        self._last_line = pace.clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def note(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def round_started(self, round_index: int, clients: Sequence[str]) -> None:
        """A round begins with these clients."""
        with self._lock:
            self._pace.start_round(round_index, clients)

    def step(self, client: str, step: int, steps: int, loss: float) -> None:
        """A client made a step of local training."""
        with self._lock:
            self._pace.step(client, step, steps)
            if self._pace.clock() - self._last_line < SECONDS_BETWEEN_STEP_LINES:
                return
            left = self._pace.seconds_left()
            tail = "" if left is None else f"  about {duration_text(left)} left"
            self._write(self._client_line(client, f"step {step}/{steps}  loss {_number(loss)}{tail}"))

    def client_finished(self, line: Mapping[str, Any]) -> None:
        """A client's line of metrics.jsonl is complete."""
        with self._lock:
            self._write(self._client_line(line["client"], client_text(line)))

    def round_finished(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._write(round_text(self._pace, self._pace.finish_round(), line))

    def _client_line(self, client: str, text: str) -> str:
        return f"round {self._pace.round_index}/{self._pace.rounds}  {client:<{self._width}}  {text}"

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
        self._last_line = self._pace.clock()


@dataclass
class _Row:
    """What the live table shows of one client."""

    state: str = "waiting"
    loss: str = "–"
    local: str = "–"
    aggregated: str = "–"
    best: str = "–"


class LiveDisplay:
    """A table of clients and a bar with the time left; notes, prints and log lines scroll above them."""

    def __init__(self, pace: Pace, clients: Sequence[str], stream: TextIO) -> None:
        self._pace = pace
        self._rows = {name: _Row() for name in clients}
        self._lock = threading.RLock()
        self._restore: list[Callable[[], object]] = []
        self.console = Console(file=stream, highlight=False)
        self._live = Live(
            get_renderable=self._render,
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            # A stream that the user sent to a file stays there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        self._redirect_logging()
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        while self._restore:
            self._restore.pop()()

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def round_started(self, round_index: int, clients: Sequence[str]) -> None:
        """A round begins with these clients."""
        with self._lock:
            self._pace.start_round(round_index, clients)
            for name in clients:
                self._rows.setdefault(name, _Row())
            for name, row in self._rows.items():
                row.state = "waiting" if name in clients else "not in this round"

    def step(self, client: str, step: int, steps: int, loss: float) -> None:
        """A client made a step of local training."""
        with self._lock:
            self._pace.step(client, step, steps)
            row = self._rows.setdefault(client, _Row())
            row.state = f"training, step {step} of {steps}" if step < steps else "validating"
            row.loss = _number(loss)

    def client_finished(self, line: Mapping[str, Any]) -> None:
        """A client's line of metrics.jsonl is complete."""
        with self._lock:
            row = self._rows.setdefault(line["client"], _Row())
            row.state = "done" if line.get("participated", True) else "did not take part"
            if line.get("phase") == "warm-up":
                row.state = "warming up"
            if line.get("refused"):
                row.state = "update refused"
            if line.get("train_loss") is not None:
                row.loss = _number(line["train_loss"])
            if line.get("local"):
                row.local = _score(line, "local")
            if line.get("aggregated"):
                row.aggregated = _score(line, "aggregated")
            if line.get("best"):
                row.best = f"{_score(line, 'best')} (round {line['best'].get('round', '–')})"
        if line.get("refused"):
            self.note(f"{line['client']}: {client_text(line)}")

    def round_finished(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            text = round_text(self._pace, self._pace.finish_round(), line)
        self.note(text)

    def _render(self) -> RenderableType:
        with self._lock:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
            for title in ("client", "state"):
                table.add_column(title, overflow="ellipsis", no_wrap=True)
            for title in ("loss", "local", "aggregated", "best"):
                table.add_column(title, justify="right", no_wrap=True)
            for name, row in self._rows.items():
                # Text, not str: a name such as "[red]" is no markup.
                cells = (name, row.state, row.loss, row.local, row.aggregated, row.best)
                table.add_row(*(Text(cell, style="dim" if cell == "–" else "") for cell in cells))
            return Group(Text(""), table, self._progress())

    def _progress(self) -> RenderableType:
        left = self._pace.seconds_left()
        over = self._pace.rounds_done >= self._pace.rounds
        shown = max(self._pace.round_index, self._pace.first_round)
        tail = "done" if over else "time left not known yet" if left is None else f"about {duration_text(left)} left"
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            Text(f"round {shown} of {self._pace.rounds}"),
            ProgressBar(total=max(self._pace.rounds, 1), completed=self._pace.rounds_done, width=32),
            Text(f"{duration_text(self._pace.elapsed)}, {tail}"),
        )
        return line

    def _redirect_logging(self) -> None:
        """Sends log lines that would land on the terminal through the console, so that they do not tear the table."""
        for handler in _handlers():
            if isinstance(handler, RichHandler):
                self._restore.append(partial(setattr, handler, "console", handler.console))
                handler.console = self.console
            elif isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream):
                proxy = FileProxy(self.console, handler.stream)
                # Undone in reverse: an unfinished line comes out before the handler gets its stream back.
                self._restore.append(partial(handler.setStream, handler.stream))
                self._restore.append(proxy.flush)
                handler.setStream(proxy)


def _is_terminal(stream: Any) -> bool:
    """Whether a log handler's stream is a terminal; it may be None (a file opened later) or any object that writes."""
    return bool(getattr(stream, "isatty", bool)())


def _handlers() -> set[logging.Handler]:
    loggers = [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    return {handler for logger in (logging.root, *loggers) for handler in logger.handlers}
