"""Options of the benchmarks; speed is asserted nowhere."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedcmt")
    group.addoption("--elements", type=int, default=4_000_000, help="length P of each update")
    group.addoption("--clients", type=int, default=8, help="number N of updates")
    group.addoption("--device", default="cpu", help="cpu or cuda")
