"""The stages of a prediction: order, bounded memory, errors of cases and of the program."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from fedcmt.errors import InputError, RunError
from fedcmt.pipeline import Pipeline


def run(items: Any, load: Any = None, compute: Any = None, store: Any = None) -> list[tuple[int, BaseException | None]]:
    """Take items through stages that do nothing unless given; returns what was reported."""
    reported: list[tuple[int, BaseException | None]] = []
    Pipeline(
        load or (lambda item: item),
        compute or (lambda item, value: value),
        store or (lambda item, value: None),
        lambda item, error: reported.append((item, error)),
    ).run(items)
    return reported


def test_every_item_passes_all_stages_in_order() -> None:
    stored = []
    reported = run(range(20), lambda i: i * 2, lambda i, v: v + i, lambda i, v: stored.append((i, v)))
    assert stored == [(i, 3 * i) for i in range(20)]
    assert reported == [(i, None) for i in range(20)]


@pytest.mark.parametrize("error", [InputError("bad"), RunError("bad"), OSError("bad"), MemoryError("bad")])
@pytest.mark.parametrize("stage", ["load", "compute", "store"])
def test_a_broken_case_is_reported_and_the_others_go_on(stage: str, error: Exception) -> None:
    def fail(item: int, value: Any = None) -> Any:
        if item == 1:
            raise error
        return item

    assert run(range(4), **{stage: fail}) == [(0, None), (1, error), (2, None), (3, None)]


@pytest.mark.parametrize("stage", ["load", "compute", "store"])
def test_a_defect_ends_the_run(stage: str) -> None:
    def fail(item: int, value: Any = None) -> Any:
        raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        run(range(100), **{stage: fail})
    assert not [thread for thread in threading.enumerate() if thread.name in ("read", "write")]


def test_an_interrupt_ends_the_threads() -> None:
    def interrupt(item: int, value: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(range(100), compute=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name in ("read", "write")]


def test_reading_does_not_run_ahead() -> None:
    read, ahead = [], []

    def compute(item: int, value: int) -> int:
        time.sleep(0.02)
        ahead.append(len(read) - item)
        return value

    run(range(12), lambda item: read.append(item), compute)
    assert max(ahead) <= 3  # the one computed, one waiting, one being read
