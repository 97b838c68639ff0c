"""The real guest_memfd of this machine's kernel, as a peer; None where there is none."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from guestmem.uapi.kvm import KVM_CREATE_GUEST_MEMFD

KVM_CREATE_VM = 0xAE01


class RealGuestMemfd:
    """A mappable guest_memfd of a default VM on /dev/kvm."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    @contextmanager
    def open(size: int) -> Iterator[RealGuestMemfd | None]:
        """One of `size` bytes with MMAP and INIT_SHARED; None if /dev/kvm or the feature is missing."""
        fds: list[int] = []
        try:
            try:
                fds.append(os.open("/dev/kvm", os.O_RDWR))
                fds.append(fcntl.ioctl(fds[0], KVM_CREATE_VM, 0))
                argument = struct.pack("<QQ6Q", size, 3, *(0,) * 6)
                fds.append(_ioctl_fd(fds[1], KVM_CREATE_GUEST_MEMFD, argument))
            except OSError:
                yield None
                return
            yield RealGuestMemfd(fds[2])
        finally:
            for fd in reversed(fds):
                os.close(fd)


def _ioctl_fd(fd: int, request: int, argument: bytes) -> int:
    """What the ioctl returns. For an immutable argument Python would return the buffer in its place."""
    return int(fcntl.ioctl(fd, request, bytearray(argument), True))
