"""Memory of large arrays is kept when asked to, and given back when asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from fedcmt.allocator import give_back_freed_blocks, reuse_large_blocks

def resident_mib():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) // 1024

assert reuse_large_blocks()
before = resident_mib()
# The first block lies below the second, which stays: only trimming reaches it.
first, second = np.ones(2**24), np.ones(2**10)
held = resident_mib() - before
del first
kept = resident_mib() - before
give_back_freed_blocks()
print(held, kept, resident_mib() - before, len(second))
"""


def test_freed_blocks_are_kept_until_given_back() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held, kept, after, _ = map(int, done.stdout.split())
    assert held >= 127
    assert kept >= 127
    assert after < 16
