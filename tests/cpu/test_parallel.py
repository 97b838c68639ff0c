"""CPUs that run at once: atomics are exact. Each case is a process, whose mode it is."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "arguments", [("atomics", "2", "100000", "20000"), ("atomics", "4", "20000", "5000")], ids=" ".join
)
def test_no_update_is_lost(arguments: tuple[str, ...]) -> None:
    """lock inc, xadd, cmpxchg, a lock inc across two cache lines, cmpxchg16b."""
    command = [sys.executable, "-m", "tests.cpu.parallel_cpus", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
