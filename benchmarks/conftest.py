"""Options of the benchmarks; speed is asserted nowhere."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedcmt")
    group.addoption("--elements", type=int, default=4_000_000, help="length D of each of 8 updates")
    group.addoption("--cycles", type=int, default=7, help="calls of each contender, one a cycle")
    group.addoption("--mapped-full", action="store_true", help="also 64 updates of 50e6 elements in files, 12.8 GB")
