"""Programs that run csrc/cuda on the CPU, compiled once for all tests of this folder."""

from __future__ import annotations

import pytest
from builds import Builder, find_toolchain


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    toolchain = find_toolchain()
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    return Builder(toolchain, tmp_path_factory.mktemp("cuda_on_cpu"))
