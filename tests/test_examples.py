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


def test_a_discard_past_the_manager_is_a_stale_page_with_pins_and_none_with_notifications() -> None:
    command = [sys.executable, str(SCRIPTS / "discard_listener.py")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pins, notifications = out.split("notifications:\n")
    assert "convert past the manager:   refused, convert.busy" in pins
    assert "memory has b'new' and the device reads b'old'" in pins
    assert "convert past the manager:   done" in notifications
    assert "memory has b'new' and the device reads b'new'" in notifications


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


@pytest.mark.parametrize("kind", ["-no-pie", "-static"])
def test_a_guest_outlives_the_vmm_that_is_killed(tmp_path: pathlib.Path, kind: str) -> None:
    if shim_path() is None or shutil.which("gcc") is None:
        pytest.skip("no gcc, or no shim: it was not there at installation")
    client = tmp_path / "restart"
    source = ROOT / "examples" / "clients" / "restart.c"
    build = ["gcc", "-Wall", "-Werror", kind, "-o", str(client), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode and "cannot find -lc" in built.stderr:
        pytest.skip("no static libc (libc.a)")
    assert built.returncode == 0, built.stderr
    command = [sys.executable, "-m", "guestmem.cli.main", "run", "--", str(client)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": yes\n") == 3
    assert ": no" not in done.stdout
