"""The example scripts run and print what they promise."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from guestmem.native import shim_path

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "scripts"


def test_balloon_frees_by_a_hole_and_not_by_dontneed() -> None:
    out = subprocess.run([sys.executable, str(SCRIPTS / "balloon.py")], capture_output=True, text=True, check=True)
    held = [int(line.split(":")[1].split()[0]) for line in out.stdout.splitlines()]
    assert held == [256, 256, 128, 0]


def test_the_first_client_prints_what_the_readme_shows(tmp_path: pathlib.Path) -> None:
    if shim_path() is None or shutil.which("gcc") is None:
        pytest.skip("no gcc, or no shim: it was not there at installation")
    client = tmp_path / "first"
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", client, ROOT / "examples" / "clients" / "first.c"], check=True)
    command = [sys.executable, "-m", "guestmem.cli.main", "run", "--explain", "--", str(client)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    shown = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert sorted(shown[1].splitlines()) == sorted(done.stdout.splitlines() + done.stderr.splitlines())
