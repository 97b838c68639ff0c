"""Clients as static programs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.conftest import CLIENTS

_OWN = Path(__file__).with_name("clients")


@pytest.fixture(scope="session")
def build_static(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build_static("calls"): the program of clients/calls.c, here or in tests/clients. `kind` is gcc's option."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    directory = tmp_path_factory.mktemp("static")

    def build(name: str, kind: str = "-static") -> Path:
        program = directory / f"{name}{kind}"
        if not program.exists():
            source = next(path for room in (_OWN, CLIENTS) if (path := room / f"{name}.c").exists())
            flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CLIENTS}", kind]
            built = subprocess.run(["gcc", *flags, "-o", program, source], capture_output=True, text=True, check=False)
            if built.returncode and "cannot find -lc" in built.stderr:
                pytest.skip("no static libc (libc.a)")
            assert built.returncode == 0, built.stderr
        return program

    return build
