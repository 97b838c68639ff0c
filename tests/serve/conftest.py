"""Clients in C, built here and run by the real `guestmem run`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guestmem.native import shim_path

CLIENTS = Path(__file__).parents[1] / "clients"
SECONDS = 120
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build("misuse"): the program of tests/clients/misuse.c. build("misuse", "-static") as well, or a skip."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    directory = tmp_path_factory.mktemp("clients")

    def build_client(name: str, *more: str) -> Path:
        program = directory / f"{name}{''.join(more)}"
        if not program.exists():
            flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *more]
            done = subprocess.run(["gcc", *flags, "-o", program, CLIENTS / f"{name}.c"], check=False)
            if done.returncode and "-static" in more:
                pytest.skip("no static libc (libc.a)")
            assert not done.returncode, f"{name}.c does not compile"
        return program

    return build_client


@pytest.fixture(scope="session")
def guestmem() -> Callable[..., Done]:
    """guestmem("--abi", "v6.18", "--", program, ...): what the command printed and how it ended."""
    if shim_path() is None:
        pytest.skip("the shim was not built: no compiler at installation")

    def run(*arguments: str | Path, **options: object) -> Done:
        command = [sys.executable, "-m", "guestmem.cli.main", "run", *map(str, arguments)]
        settings: dict[str, object] = {"capture_output": True, "text": True, "timeout": SECONDS} | options
        return subprocess.run(command, check=False, **settings)  # type: ignore[call-overload,no-any-return]

    return run
