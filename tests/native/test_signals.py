"""Signals during calls. A run lasts long unless a signal ends it, so one that is lost fails a test by its time."""

from __future__ import annotations

import pytest

from tests.native.conftest import Run
from tests.native.fake_server import FakeServer

LONG, SHORT = 100.0, 0.1


@pytest.mark.parametrize(
    ("name", "run_time"),
    [
        ("no_lost_kick", LONG),
        ("signal_mask", LONG),
        ("signal_mask_arguments", SHORT),
        ("signal_mask_blocks", SHORT),
        ("sa_restart", LONG),
        ("handler_calls", LONG),
        ("handler_runs", LONG),
        ("handler_jumps", LONG),
        ("handler_forks", LONG),
        ("others_wait", LONG),
        ("fallocate_ends", LONG),
        ("ignored", SHORT),
    ],
)
def test_signals(run: Run, server: FakeServer, name: str, run_time: float) -> None:
    server.run_time = run_time
    run("signals", name)


def test_everything_at_once(run: Run, server: FakeServer) -> None:
    server.run_time = LONG
    run("stress")
