"""Reading ahead: order, memory, errors, and threads that hang."""

from __future__ import annotations

import threading
import time

import pytest

from fedcmt.data.readahead import ReadAhead
from fedcmt.errors import InputError, RunError


class Squares:
    """Makes squares; what is asked for hangs or fails."""

    def __init__(self, hangs: dict[int, int] | None = None, fails: tuple[int, ...] = (), pause: float = 0.0) -> None:
        self.hangs, self.fails, self.pause = dict(hangs or {}), fails, pause
        self.made: list[int] = []
        self.release = threading.Event()
        self.lock = threading.Lock()

    def doing(self) -> str:
        return "client 'a', case 'b'"

    def make(self, index: int) -> int:
        with self.lock:
            self.made.append(index)
            hang = self.hangs.get(index, 0) > 0
            self.hangs[index] = self.hangs.get(index, 0) - 1
        if hang:
            self.release.wait(20)
        time.sleep(self.pause * (index % 3))
        if index in self.fails:
            raise InputError("broken", client="a", case="b")
        return index * index


def ahead(maker: Squares, **settings: object) -> ReadAhead[int]:
    defaults = {"first": 0, "count": 12, "threads": 1, "ahead": 2, "timeout": 5.0}
    return ReadAhead(lambda: maker, **{**defaults, **settings})


@pytest.mark.parametrize("threads", [1, 3])
def test_items_come_in_order(threads: int) -> None:
    with ahead(Squares(pause=0.002), threads=threads, first=4) as items:
        assert list(items) == [i * i for i in range(4, 16)]


def test_no_more_is_made_than_asked_for() -> None:
    maker = Squares()
    with ahead(maker, ahead=3) as items:
        next(items)
        time.sleep(0.1)
        assert max(maker.made) == 3  # the first is in use, three more are ready


def test_an_error_comes_at_its_turn() -> None:
    with ahead(Squares(fails=(2,)), threads=2) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(InputError, match="client 'a', case 'b': broken"):
            next(items)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_hanging_thread_is_replaced_and_the_order_kept(threads: int) -> None:
    maker, notes = Squares(hangs={3: 2, 7: 1}), []
    started = time.monotonic()
    with ahead(maker, threads=threads, timeout=0.4, note=notes.append) as items:
        assert list(items) == [i * i for i in range(12)]
        assert items.replaced == 3
    maker.release.set()
    assert time.monotonic() - started < 5
    assert notes == ["client 'a', case 'b': nothing within 0.4 s, trying again"] * 3


def test_what_hangs_for_ever_ends_in_one_line() -> None:
    maker = Squares(hangs={1: 99})
    with ahead(maker, timeout=0.1) as items:
        next(items)
        with pytest.raises(RunError, match=r"^client 'a', case 'b': nothing within 0.1 s, 3 times$"):
            next(items)
        maker.release.set()


def test_a_slow_consumer_is_no_hang() -> None:
    with ahead(Squares(), timeout=0.3) as items:
        for _ in range(2):
            next(items)
            time.sleep(0.4)
        assert items.replaced == 0
        assert items.seconds_waited < 0.4


def test_threads_end_with_the_block() -> None:
    before = threading.active_count()
    for _ in range(3):
        with ahead(Squares(pause=0.01), threads=2) as items:
            next(items)
    deadline = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
