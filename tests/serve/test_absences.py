"""Why a program gave up: what it was told shortly before its end."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from guestmem.serve.absences import Absences
from guestmem.uapi.capability_names import CAPABILITY_NAMES, capability_name
from tests.serve.conftest import Done

GIVES_UP = """
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
int main(int argc, char **argv) {
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_XEN_HVM);
    if (argc > 2) for (int i = 0; i < 100; i++) ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
    return ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) ? 9 : argc > 1;
}
"""


def program(tmp_path: Path) -> Path:
    (tmp_path / "gives_up.c").write_text(GIVES_UP)
    subprocess.check_call(["cc", "-o", tmp_path / "gives_up", tmp_path / "gives_up.c"])
    return tmp_path / "gives_up"


def test_the_last_is_first_and_each_is_there_once() -> None:
    absences = Absences()
    for number in (38, 157, 38):
        absences.calls += 1
        absences.capability(number)
    absences.refused("KVM_RUN", "EINVAL")
    assert absences.at_the_end() == [
        "KVM_RUN: EINVAL",
        "KVM_CAP_XEN_HVM (38) is not there",
        "KVM_CAP_NESTED_STATE (157) is not there",
    ]


def test_what_was_long_ago_is_no_reason() -> None:
    absences = Absences()
    absences.capability(38)
    absences.calls += 100
    assert absences.at_the_end() == []


def test_only_so_many_are_kept() -> None:
    absences = Absences()
    for number in range(1000):
        absences.capability(number)
    assert len(list(absences)) == 64


def test_names_are_those_of_the_header() -> None:
    assert capability_name(32) == "KVM_CAP_IRQFD (32)"
    assert capability_name(54321) == "capability 54321"
    assert len(set(CAPABILITY_NAMES.values())) == len(CAPABILITY_NAMES)


def test_a_program_that_fails_is_told_why(tmp_path: Path, guestmem: Callable[..., Done]) -> None:
    done = guestmem("--", program(tmp_path), "fail")
    assert done.returncode == 1
    assert done.stderr == (
        "guestmem run: gives_up failed shortly after these answers:\n"
        "  KVM_CAP_NESTED_STATE (157) is not there\n"
        "  KVM_CAP_XEN_HVM (38) is not there\n"
    )
    late = guestmem("--", program(tmp_path), "fail", "late").stderr
    assert "NESTED_STATE" in late and "XEN_HVM" not in late


def test_explain_names_them_all_however_it_ends(tmp_path: Path, guestmem: Callable[..., Done]) -> None:
    done = guestmem("--explain", "--", program(tmp_path))
    assert done.returncode == 0
    assert "failed" not in done.stderr
    assert "capabilities that are not there\n  KVM_CAP_XEN_HVM (38), KVM_CAP_NESTED_STATE (157)\n" in done.stderr
