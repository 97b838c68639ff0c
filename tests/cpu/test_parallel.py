"""CPUs that run at once. Each case is a process, whose mode it is."""

from __future__ import annotations

import subprocess
import sys

import pytest


def check(*arguments: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.cpu.parallel_cpus", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("cpus", "rounds", "wide"), [("2", "100000", "20000"), ("4", "20000", "5000")])
def test_no_update_is_lost(cpus: str, rounds: str, wide: str) -> None:
    """lock inc, xadd, cmpxchg, a lock inc across two cache lines, cmpxchg16b."""
    check("atomics", cpus, rounds, wide)


@pytest.mark.parametrize("cpus", ["1", "4"])
def test_nothing_is_written_after_a_drop(cpus: str) -> None:
    check("dropped", cpus, "400")


def test_a_blocked_cpu_holds_nobody_up() -> None:
    check("blocked")
