"""Progress: plain lines, the live table, time left."""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

import pytest

from fedcmt.display import LiveDisplay, Pace, PlainDisplay, duration_text, open_display

CLIENTS = ["mr_brain", "[red]ct[/red]"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def client_line(client: str, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "client",
        "round": 3,
        "client": client,
        "participated": True,
        "train_loss": 0.41236,
        "local": {"score": 0.5512, "metric": "dice"},
        "aggregated": {"score": 0.4979, "metric": "dice"},
        "best": {"round": 3, "stage": "local", "score": 0.5512},
    }
    return {**line, **changes}


def test_plain_lines(clock: FakeClock) -> None:
    stream = io.StringIO()
    with PlainDisplay(Pace(8, first_round=3, clock=clock), CLIENTS, stream) as display:
        display.note("backend native")
        display.round_started(3, CLIENTS)
        display.step("mr_brain", 1, 2, 0.9)
        clock.now += 41
        display.client_finished(client_line("mr_brain"))
        display.client_finished(client_line(CLIENTS[1], participated=False, refused="NaN in update", train_loss=None))
        display.round_finished({"kind": "server", "round": 3})
    assert stream.getvalue().splitlines() == [
        "backend native",
        "round 3/8  mr_brain       loss 0.412  dice 0.551 local, 0.498 aggregated, best 0.551 (round 3)",
        "round 3/8  [red]ct[/red]  update refused: NaN in update"
        "  dice 0.551 local, 0.498 aggregated, best 0.551 (round 3)",
        "round 3/8 done in 41 s, about 3 min 25 s left",
    ]


def test_plain_last_round_tells_the_whole_time(clock: FakeClock) -> None:
    stream = io.StringIO()
    with PlainDisplay(Pace(1, clock=clock), CLIENTS, stream) as display:
        display.round_started(1, CLIENTS)
        clock.now += 3661
        display.client_finished(client_line("mr_brain", local={"score": None, "metric": "balanced_accuracy"},
                                            aggregated=None, best=None))  # fmt: skip
        display.round_finished({"round": 1})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("loss 0.412  balanced accuracy – local")
    assert lines[1] == "round 1/1 done in 1 h 01 min, 1 h 01 min in all"


def test_plain_long_round_shows_signs_of_life(clock: FakeClock) -> None:
    stream = io.StringIO()
    display = PlainDisplay(Pace(2, clock=clock), ["a", "b"], stream)
    display.round_started(1, ["a", "b"])
    for step in range(1, 101):
        clock.now += 1
        display.step("a", step, 100, 0.5)
    assert stream.getvalue() == "round 1/2  a  step 60/100  loss 0.500  about 5 min 40 s left\n"


def test_time_left_from_steps_then_from_rounds(clock: FakeClock) -> None:
    pace = Pace(4, clock=clock)
    assert pace.seconds_left() is None
    pace.start_round(1, ["a", "b"])
    pace.step("a", 1, 1000)
    clock.now += 10
    assert pace.seconds_left() is None
    pace.step("a", 500, 1000)
    # A quarter of the round took 10 s: 40 s a round, 30 s left of this one.
    assert pace.seconds_left() == pytest.approx(150)
    assert pace.rounds_done == pytest.approx(0.25)
    clock.now += 10
    assert pace.finish_round() == pytest.approx(20)
    assert pace.seconds_left() == pytest.approx(60)
    pace.start_round(2, ["a"])
    clock.now += 100
    assert pace.seconds_left() == pytest.approx(40)
    assert Pace(4, first_round=4, clock=clock).rounds_done == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (205, "3 min 25 s"), (7500, "2 h 05 min"), (-3, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb"), ("CI", "true")])
def test_environment_asks_for_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    assert isinstance(open_display(2, CLIENTS, stream=terminal), LiveDisplay)
    assert isinstance(open_display(2, CLIENTS, stream=io.StringIO()), PlainDisplay)
    monkeypatch.setenv(*variable)
    assert isinstance(open_display(2, CLIENTS, stream=terminal), PlainDisplay)


def visible(stream: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")


def test_live_table_and_whole_log_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("test_display")
    logger.addHandler(handler)
    try:
        with open_display(2, CLIENTS, stream=terminal) as display:
            display.note("note with [bold]brackets[/bold]")
            display.round_started(1, CLIENTS)
            display.step("mr_brain", 3, 10, 0.75)
            logger.warning("a log line")
            print("printed to stderr", file=sys.stderr)
            assert isinstance(display, LiveDisplay)
            display._live.refresh()
            display.step("mr_brain", 10, 10, 0.5)
            display.client_finished(client_line("mr_brain"))
            display.client_finished(client_line(CLIENTS[1], participated=False, refused="NaN in update"))
            display.round_finished({"round": 1})
        assert handler.stream is terminal
        assert sys.stderr is terminal
    finally:
        logger.removeHandler(handler)
    lines = [line.strip() for line in visible(terminal).splitlines()]
    for whole in ("a log line", "printed to stderr", "note with [bold]brackets[/bold]"):
        assert whole in lines
    text = "\n".join(lines)
    assert re.search(r"mr_brain +training, step 3 of 10 +0\.750", text)
    assert re.search(r"\[red\]ct\[/red\] +update refused", text)
    assert re.search(r"mr_brain +done +0\.412 +0\.551 +0\.498 +0\.551 \(round 3\)", text)
    assert any(line.startswith("round 1/2 done in 0 s") for line in lines)


def test_live_display_is_taken_down_after_an_error(terminal: Terminal) -> None:
    def fail() -> None:
        with open_display(2, CLIENTS, stream=terminal):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    # The cursor is shown again.
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")
