"""The example scripts run and print what they promise."""

from __future__ import annotations

import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parents[1] / "examples" / "scripts"


def test_balloon_frees_by_a_hole_and_not_by_dontneed() -> None:
    out = subprocess.run([sys.executable, str(SCRIPTS / "balloon.py")], capture_output=True, text=True, check=True)
    held = [int(line.split(":")[1].split()[0]) for line in out.stdout.splitlines()]
    assert held == [256, 256, 128, 0]
