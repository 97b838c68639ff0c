"""Clients in C, run with the shim preloaded and a FakeServer at the other end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestmem.native import shim_path
from tests.native.fake_server import FakeServer

_CLIENTS = Path(__file__).with_name("clients")
_SECONDS = 120
_NOT_HERE = 77


@pytest.fixture(scope="session")
def shim() -> Path:
    path = shim_path()
    if path is None:
        pytest.skip("the shim was not built: no compiler at installation")
    return path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("clients")

    def compile_client(name: str) -> Path:
        program = directory / name
        if not program.exists():
            flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
            subprocess.run(["gcc", *flags, "-o", program, _CLIENTS / f"{name}.c"], check=True)
        return program

    return compile_client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path)
    yield server
    server.close()


Run = Callable[..., None]


@pytest.fixture
def run(server: FakeServer, shim: Path, compiled: Callable[[str], Path]) -> Run:
    """run("calls", "plain"): the client's word for it is that it ends with 0 and says nothing. One that cannot be run
    here says why and ends with 77."""

    def run_client(program: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        done = subprocess.run(
            [compiled(program), *arguments],
            env=os.environ | (server.environment(shim) if environment is None else environment),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if done.returncode == _NOT_HERE:
            pytest.skip(done.stdout.strip())
        assert done.stderr == "" and done.stdout == ""
        assert done.returncode == 0

    return run_client
