"""The CUDA operations under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import pytest
from builds import ADDRESS, THREAD, Builder, Flavour, run_program


@pytest.mark.parametrize(
    ("flavour", "effort", "order"),
    [(ADDRESS, "small", "forward"), (ADDRESS, "small", "random"), (THREAD, "tiny", "forward")],
    ids=["address", "address-random", "thread"],
)
def test_sanitizer_finds_nothing(builder: Builder, flavour: Flavour, effort: str, order: str) -> None:
    done = run_program(builder.program(flavour), flavour, effort, order=order)
    unexpected = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert (done.returncode, unexpected) == (0, [])
