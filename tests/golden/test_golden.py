"""The golden rows of Linux 6.18: the same C probe on such a kernel, where there is one, and under `guestmem run`."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
from pathlib import Path

import pytest

from tests.golden import runner
from tests.golden.rows import PECULIAR, ROWS, SECTIONS, SLOW_ROWS, UNIMITABLE

guestmem_missing = functools.cache(runner.guestmem_missing)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is missing")


@functools.cache
def native_missing() -> str:
    """Why this machine's KVM cannot be held against the table; "" if it can.

    The table is of a 6.18 whose KVM needs neither VMX nor SVM: another back end answers section G in its own way.
    """
    if not platform.release().startswith("6.18."):
        return f"the table is of Linux 6.18, this is {platform.release()}"
    if re.search(r"^flags.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
        return "the table is of a KVM without VMX and SVM"
    if os.geteuid() != 0:
        return "the table was made by root"
    return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm is missing"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runner.build(tmp_path_factory.mktemp("golden"))


def test_table_and_probe_have_the_same_rows() -> None:
    """495 rows of the table and V46b of ours."""
    text = "".join(source.read_text(encoding="utf-8") for source in runner.PROBE_SOURCES.glob("*.c"))
    assert len(ROWS) == 496
    assert set(re.findall(r'"([A-Z]\d+b?)"', text)) == set(ROWS)


def test_marks_name_rows_and_do_not_overlap() -> None:
    assert set(PECULIAR) | set(UNIMITABLE) | SLOW_ROWS <= set(ROWS)
    assert not set(PECULIAR) & set(UNIMITABLE)
    assert all(PECULIAR.values()) and all(UNIMITABLE.values())


def test_difference_is_told_with_its_excuse() -> None:
    """A row that is peculiar or not answered; no table is needed to be wrong for that."""
    answers = runner.Answers({"G14": "KVM_EXIT_IO port=0x10 data=0x41", "C1": "12"}, [])
    found = runner.differences(answers, ["C1", "C2", "G14"])
    assert [(difference.id, bool(difference.excuse)) for difference in found] == [("C2", False), ("G14", True)]
    assert "1 of 3 rows agree, 1 differ, 1 differ as accepted" in runner.report(found, answers, ["C1", "C2", "G14"])


@needs_gcc
@pytest.mark.parametrize("section", SECTIONS)
def test_native_is_the_table(probe: Path, section: str) -> None:
    """No row may vary on that kernel. R42, 50 s and 16 GiB, is left to `python -m tests.golden --native --slow`."""
    if missing := native_missing():
        pytest.skip(missing)
    rows = runner.asked([section], slow=False)
    answers = runner.run(probe, runner.selection([section], slow=False))
    found = runner.differences(answers, rows, excuses=False)
    assert not found, runner.report(found, answers, rows)


@needs_gcc
@pytest.mark.parametrize("section", SECTIONS)
def test_guestmem_run_is_the_table(probe: Path, section: str) -> None:
    """All rows, but what the table marks as peculiar to that machine and what is listed as unimitable."""
    if missing := guestmem_missing():
        pytest.skip(missing)
    rows = runner.asked([section], slow=True)
    answers = runner.run(probe, runner.selection([section], slow=True), runner.guestmem_command())
    found = runner.differences(answers, rows)
    text = runner.report(found, answers, rows)
    print(text)
    assert all(difference.excuse for difference in found), text
    assert not runner.stale(answers, rows), "listed as unimitable, but they agree"
