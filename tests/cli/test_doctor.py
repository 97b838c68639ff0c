"""`guestmem doctor` against what can be found out in another way."""

from __future__ import annotations

import os

from typer.testing import CliRunner

from guestmem.cli.main import app
from guestmem.native import shim_path


def test_it_says_what_there_is_and_ends_accordingly() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == (0 if shim_path() else 1), done.output
    assert str(shim_path() or "not built") in done.output
    assert ("there is a real one" in done.output) == os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert f"{len(os.sched_getaffinity(0))};" in done.output
