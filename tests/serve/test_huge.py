"""A client with files of huge pages, under every policy, and on every kind of host memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guestmem.memory.host_pages import HostPages, host_pages
from guestmem.memory.pages import ORDER_2M
from tests.host_pages import one_at_a_time
from tests.serve.conftest import Done

Build = Callable[[str], Path]
Guestmem = Callable[..., Done]
SCARCE = ("--hugepages", "2M=8,1G=4")
SKIPPED = 4


@pytest.mark.parametrize("split", ["lazy", "whole"])
@pytest.mark.parametrize("conversion", ["atomic", "stepwise"])
def test_a_client_passes_under_every_policy(split: str, conversion: str, build: Build, guestmem: Guestmem) -> None:
    done = guestmem(*SCARCE, "--huge-policy", f"{split},{conversion}", "--", build("huge"), conversion)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout and "# SKIP" not in done.stdout
    assert done.stderr == ""


def test_huge_pages_are_as_many_as_one_likes_unless_told(build: Build, guestmem: Guestmem) -> None:
    done = guestmem("--", build("huge"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("# SKIP there are as many huge pages as one likes") == 4


def test_only_the_level_to_come_has_them(build: Build, guestmem: Guestmem) -> None:
    done = guestmem("--abi", "v7.4", "--", build("huge"))
    assert (done.returncode, done.stdout) == (SKIPPED, "1..0 # SKIP no files of huge pages\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--hugepages", "4M=1"), "'4M=1' is not a number of huge pages"),
        (("--hugepages", "1G=99999999999"), "pool.empty"),
        (("--huge-policy", "eager"), "'eager' is not a policy"),
    ],
)
def test_what_cannot_be_had_is_said(arguments: tuple[str, str], says: str, guestmem: Guestmem) -> None:
    done = guestmem(*arguments, "--", "true")
    assert done.returncode == 125
    assert says in done.stderr


def test_huge_pages_of_the_machine_are_used_and_given_back(build: Build, guestmem: Guestmem) -> None:
    """Files that nobody maps are made of them, and the client cannot tell."""
    if os.geteuid() or host_pages(ORDER_2M) is None:
        pytest.skip("huge pages of the machine's are for root")
    with one_at_a_time():
        before = host_pages(ORDER_2M)
        done = guestmem(*SCARCE, "--reserve-host-pages", "2M=8", "--explain", "--", build("huge"))
        after = host_pages(ORDER_2M)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    assert after == before
    if "could set aside" in done.stderr:
        pytest.skip("the machine has no memory for eight huge pages")
    assert isinstance(before, HostPages) and "hugetlb 2M" in done.stderr


def test_without_root_that_is_said(guestmem: Guestmem) -> None:
    if not os.geteuid():
        pytest.skip("root may")
    done = guestmem("--reserve-host-pages", "2M=1", "--", "true")
    assert done.returncode == 125 and "huge pages of this machine" in done.stderr
