"""The filter, evaluated here: what is notified, and what runs at the kernel's own speed."""

from __future__ import annotations

import errno

import pytest

from guestmem.serve.seccomp.bpf import (
    ALLOW,
    JUMP_EQUAL,
    LOAD,
    NOTIFY,
    RETURN,
    Step,
    SystemCall,
    assemble,
    evaluate,
)
from guestmem.serve.seccomp.filter import ALWAYS, ARCH, ON_FIRST_FD, build
from guestmem.serve.seccomp.numbers import Nr

FIRST, COOKIE = 512, 0x9234_5678
PROGRAM = build(FIRST, COOKIE, paths=False)
MINUS_ONE = (1 << 64) - 1
GETPID = 39


def verdict(number: int, *arguments: int, program: bytes = PROGRAM, arch: int = ARCH) -> int:
    return evaluate(program, SystemCall(number, arch, 0x1000, (*arguments, *(0,) * (6 - len(arguments)))))


@pytest.mark.parametrize("number", ALWAYS)
def test_some_calls_are_always_notified(number: Nr) -> None:
    assert verdict(number) == NOTIFY


@pytest.mark.parametrize("number", ON_FIRST_FD)
def test_calls_on_a_descriptor_only_if_it_may_be_ours(number: Nr) -> None:
    assert verdict(number, FIRST - 1) == ALLOW
    assert verdict(number, FIRST) == NOTIFY
    assert verdict(number, MINUS_ONE) == ALLOW
    assert verdict(number, (1 << 32) + 3) == ALLOW, "the kernel looks at the low half"


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (GETPID, (), ALLOW),
        (Nr.IOCTL, (3, 0xAE00), NOTIFY),
        (Nr.IOCTL, (3, 0xC040AED4), NOTIFY),
        (Nr.IOCTL, (3, 0x5401), ALLOW),
        (Nr.IOCTL, (FIRST, 0x5401), NOTIFY),
        (Nr.IOCTL, (3, 0xC020AA00), NOTIFY),
        (Nr.IOCTL, (3, 0xC018AA3F), ALLOW),
        (Nr.MMAP, (0, 4096, 3, 0x22, MINUS_ONE, 0), ALLOW),
        (Nr.MMAP, (0, 4096, 3, 0x32, MINUS_ONE, 0), NOTIFY),
        (Nr.MMAP, (0, 4096, 3, 0x01, 3, 0), NOTIFY),
        (Nr.MADVISE, (0, 4096, 4), NOTIFY),
        (Nr.MADVISE, (0, 4096, 15), ALLOW),
        (Nr.DUP2, (3, FIRST), NOTIFY),
        (Nr.DUP2, (FIRST, 3), NOTIFY),
        (Nr.DUP2, (3, 4), ALLOW),
        (Nr.COPY_FILE_RANGE, (3, 0, FIRST), NOTIFY),
        (Nr.CLOSE_RANGE, (3, 0xFFFF_FFFF), NOTIFY),
        (Nr.CLOSE_RANGE, (3, 10), ALLOW),
        (Nr.NEWFSTATAT, (MINUS_ONE - 99, 0), ALLOW),
        (Nr.STAT, (0x1000,), ALLOW),
    ],
)
def test_by_arguments(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert verdict(number, *arguments) == expected


def test_paths_are_looked_at_where_the_machine_has_no_device() -> None:
    program = build(FIRST, COOKIE, paths=True)
    assert verdict(Nr.STAT, 0x1000, program=program) == NOTIFY
    assert verdict(Nr.NEWFSTATAT, MINUS_ONE - 99, 0x1000, program=program) == NOTIFY


def test_calls_that_we_have_made_are_not_notified() -> None:
    assert verdict(Nr.MUNMAP, 0x1000, 4096, 0, 0, COOKIE << 32) == ALLOW
    assert verdict(Nr.MUNMAP, 0x1000, 4096, 0, 0, COOKIE) == NOTIFY
    assert verdict(Nr.MMAP, 0, 4096, 3, 0x11, COOKIE << 32 | 3) == ALLOW


def test_another_architecture_is_none_of_ours() -> None:
    assert verdict(Nr.OPENAT, arch=0x4000_0003) == ALLOW


def test_a_jump_to_nowhere_or_too_far_is_no_program() -> None:
    with pytest.raises(KeyError):
        assemble([Step(JUMP_EQUAL, 0, yes="nowhere")])
    far = [Step(LOAD, 0)] * 300
    with pytest.raises(ValueError, match="a jump of 300"):
        assemble([Step(JUMP_EQUAL, errno.EPERM, yes="end"), *far, "end", Step(RETURN, ALLOW)])
