"""The same calls to this machine's KVM and to ours at its level: the same answers. Skipped where there is no oracle.

Random calls and sequences, drawn from values at which something changes; the fixed rows are in tests/kvm.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestmem.host import Host
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal, errno_name
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import CreateGuestMemfd, UserspaceMemoryRegion2

K = PAGE_SIZE
M = 1 << 20
FILE = 2 * M
KVM_CREATE_VM, KVM_CHECK_EXTENSION = 0xAE01, 0xAE03
KVM_CAP_GUEST_MEMFD_FLAGS = 244
LEVEL = "v6.18"

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def oracle_missing() -> str:
    """Why this machine cannot be asked; "" if it can."""
    if not platform.release().startswith("6.18."):
        return f"the oracle must be Linux 6.18, this is {platform.release()}"
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        if fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS) != 3:
            return "/dev/kvm has no mappable guest_memfd"
    finally:
        os.close(kvm)
    return ""


MISSING = oracle_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")


NOT_OPEN = 1 << 30  # beyond any limit, so no descriptor on either side


class Both:
    """A VM there and a VM here, each with two files of 2 MiB; file `n` means descriptor `fds[n]` on either side."""

    def __init__(self) -> None:
        self.host = Host(level=LEVELS[LEVEL])
        self.ours = self.host.create_vm(VmType.DEFAULT)
        self.scratch = self.host.anonymous(K)
        kvm = os.open("/dev/kvm", os.O_RDWR)
        self.theirs = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        os.close(kvm)
        create = CreateGuestMemfd(FILE, 3).pack()
        self.our_fds = [self.ours.create_guest_memfd(FILE, mmap=True, init_shared=True).fd for _ in range(2)]
        self.their_fds = [fcntl.ioctl(self.theirs, uapi.KVM_CREATE_GUEST_MEMFD, bytearray(create), True) for _ in "ab"]

    def close(self) -> None:
        for fd in (*self.their_fds, self.theirs):
            os.close(fd)
        self.host.close()

    def region(self, file: int, **fields: int) -> tuple[str, str]:
        """Both answers to one region; `file` 2 is a closed descriptor."""
        return (
            self._ask_ours(fields | {"guest_memfd": [*self.our_fds, NOT_OPEN][file]}),
            self._ask_theirs(fields | {"guest_memfd": [*self.their_fds, NOT_OPEN][file]}),
        )

    def create(self, size: int, flags: int) -> tuple[str, str]:
        data = struct.pack("<QQ6Q", size, flags, *(0,) * 6)
        ours = self._ioctl(uapi.KVM_CREATE_GUEST_MEMFD, data)
        try:
            fd = fcntl.ioctl(self.theirs, uapi.KVM_CREATE_GUEST_MEMFD, bytearray(data), True)
            os.close(fd)
            theirs = "fd"
        except OSError as error:
            theirs = errno_name(error.errno)
        if ours.isdigit():
            self.host.run(self.host.process.fds.close(int(ours)))
            ours = "fd"
        return ours, theirs

    def fallocate(self, mode: int, offset: int, length: int) -> tuple[str, str]:
        file = self.host.process.fds.get(self.our_fds[0])
        try:
            self.host.run(file.inode.fallocate(mode, offset, length))  # type: ignore[attr-defined]
            ours = "0"
        except Refusal as refusal:
            ours = errno_name(refusal.errno)
        failed = libc.fallocate(self.their_fds[0], mode, offset, length)
        return ours, errno_name(ctypes.get_errno()) if failed else "0"

    def _ask_ours(self, fields: dict[str, int]) -> str:
        return self._ioctl(uapi.KVM_SET_USER_MEMORY_REGION2, UserspaceMemoryRegion2(**fields).pack())  # type: ignore[arg-type]

    def _ask_theirs(self, fields: dict[str, int]) -> str:
        data = UserspaceMemoryRegion2(**fields).pack()  # type: ignore[arg-type]
        try:
            return str(fcntl.ioctl(self.theirs, uapi.KVM_SET_USER_MEMORY_REGION2, bytearray(data), True))
        except OSError as error:
            return errno_name(error.errno)

    def _ioctl(self, request: int, data: bytes) -> str:
        self.scratch.write(0, data)
        try:
            return str(self.host.run(ioctl(self.host.process, self.ours.fd, request, self.scratch.hva)))
        except Refusal as refusal:
            return errno_name(refusal.errno)


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    made.close()


BIG = 0x7FFF_FFFF_FFFF_F000
sizes = st.sampled_from([0, 1, K, 2 * K, M, FILE, FILE + K, 8 << 40, BIG, BIG + K, 2**64 - K])
offsets = st.sampled_from([0, 1, K, M, M + K, FILE - K, FILE, FILE + K, 1 << 62, BIG, BIG - K, 1 << 63, 2**64 - K])
gpas = st.sampled_from([0, 1, K, M, M - K, 4 * M, 1 << 46, 1 << 51, (1 << 52) - K, 1 << 52, 2**64 - K])
hvas = st.sampled_from([0, 1, K, 0x10000, (1 << 47) - K, (1 << 47) - 2 * K, 1 << 47, 1 << 48, 0xFFFF_8000_0000_0000])
flags = st.sampled_from([0, 4, 4, 4, 1, 2, 3, 5, 6, 8, 12, 1 << 16])
slots = st.sampled_from([0, 1, 2, 32763, 32764, 0x10000, 0xFFFF])

regions = st.fixed_dictionaries(
    {
        "slot": slots,
        "flags": flags,
        "guest_phys_addr": gpas,
        "memory_size": sizes,
        "userspace_addr": hvas,
        "guest_memfd_offset": offsets,
    }
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 2), regions), min_size=1, max_size=12))
def test_sequences_of_regions_are_answered_alike(calls: list[tuple[int, dict[str, int]]]) -> None:
    both = Both()
    try:
        for file, fields in calls:
            ours, theirs = both.region(file, **fields)
            assert ours == theirs, (file, fields)
    finally:
        both.close()


plausible = st.fixed_dictionaries(
    {
        "slot": st.integers(0, 2),
        "flags": st.sampled_from([0, 4, 4, 4, 1, 2]),
        "guest_phys_addr": st.sampled_from([0, M, 2 * M, M - K]),
        "memory_size": st.sampled_from([0, 0, K, M]),
        "userspace_addr": st.sampled_from([0, 0x10000]),
        "guest_memfd_offset": st.sampled_from([0, K, M, M - K]),
    }
)


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 1), plausible), min_size=4, max_size=25))
def test_sequences_that_mostly_succeed_are_answered_alike(calls: list[tuple[int, dict[str, int]]]) -> None:
    both = Both()
    try:
        for file, fields in calls:
            ours, theirs = both.region(file, **fields)
            assert ours == theirs, (file, fields)
    finally:
        both.close()


@SETTINGS
@given(sizes, st.sampled_from([0, 1, 2, 3, 4, 5, 8, 1 << 32, 1 << 63]))
def test_create_is_answered_alike(size: int, wanted: int) -> None:
    both = Both()
    try:
        ours, theirs = both.create(size, wanted)
        assert ours == theirs
    finally:
        both.close()


lengths = st.sampled_from([0, 1, 100, K, 2 * K, M, FILE, FILE + K, BIG, 2**63 - 1, -1, -K])
places = st.sampled_from([0, 1, K, M, FILE - K, FILE, FILE + K, BIG, BIG - K, 2**63 - 1, -1, -K])
modes = st.integers(0, 0x1FF) | st.sampled_from([0, 1, 3, 0x1000, 0x1001])


@settings(SETTINGS, max_examples=1000)
@given(mode=modes, offset=places, length=lengths)
def test_fallocate_is_answered_alike(mode: int, offset: int, length: int) -> None:
    ours, theirs = _shared().fallocate(mode, offset, length)
    assert ours == theirs


_kept: list[Both] = []


def _shared() -> Both:
    """One pair for all fallocate examples: they depend on nothing that came before."""
    if not _kept:
        _kept.append(Both())
    return _kept[0]


def teardown_module() -> None:
    for both in _kept:
        both.close()
    _kept.clear()
