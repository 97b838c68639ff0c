"""`guestmem doctor` against what can be found out in another way."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from guestmem.cli.main import app
from guestmem.memory.host_pages import host_pages, more_host_pages
from guestmem.memory.pages import ORDER_2M
from guestmem.native import shim_path
from tests.host_pages import one_at_a_time


def test_it_says_what_there_is_and_ends_accordingly() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == (0 if shim_path() else 1), done.output
    assert str(shim_path() or "not built") in done.output
    assert ("there is a real one" in done.output) == os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert f"{len(os.sched_getaffinity(0))};" in done.output


def test_it_says_what_files_of_huge_pages_are_made_of() -> None:
    if os.geteuid() or host_pages(ORDER_2M) is None:
        pytest.skip("huge pages of the machine's are for root")
    with one_at_a_time():
        before = host_pages(ORDER_2M)
        assert before is not None
        if not before.available:
            done = CliRunner().invoke(app, ["doctor"])
            assert "a file of 2M pages is memfd" in done.output
        with more_host_pages({ORDER_2M: 4}) as got:
            done = CliRunner().invoke(app, ["doctor"])
    if not got[ORDER_2M]:
        pytest.skip("the machine has no memory for a huge page")
    assert f"2M: {before.total + got[ORDER_2M]} reserved" in done.output
    assert "a file of 2M pages is hugetlb 2M" in done.output
    assert "one that clients may map is memfd" in done.output
