"""fork, exec, and descriptors that come from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.conftest import Run
from tests.native.fake_server import FakeServer


@pytest.mark.parametrize(
    "name", ["fork_files", "fork_private", "bare_clone", "vfork_child", "exec", "passed", "taken", "many"]
)
def test_process(run: Run, name: str) -> None:
    run("process", name)


def test_server_gone(run: Run, server: FakeServer) -> None:
    server.run_time = 100.0
    run("process", "server_gone")


@pytest.mark.parametrize("preloaded", [True, False])
def test_inert_without_a_server(run: Run, shim: Path, preloaded: bool) -> None:
    run("process", "inert", environment={"LD_PRELOAD": str(shim) if preloaded else ""})
