"""The listener of a seccomp filter: the descriptor at which notifications arrive. Source: man 2 seccomp_unotify."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from guestmem.serve.seccomp.bpf import SystemCall

_RECV, _SEND, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40182103, 0x40082104
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")
_ADDFD_ARGUMENT = struct.Struct("<QIIII")
_CONTINUE, _SETFD, _SEND_TOO, _SYNC_WAKE_UP = 1, 1, 2, 1
_ERESTARTSYS = 512
_GONE = (errno.ENOENT, errno.ESRCH, errno.EINTR)


class Notification(NamedTuple):
    """A thread waits in a system call. Once received, only the answer, or death, ends that (WAIT_KILLABLE_RECV)."""

    id: int
    tid: int
    call: SystemCall


class Gone(Exception):
    """Nobody waits for this answer any more: the thread has been killed."""


class Listener:
    """`fd` can be polled; it takes the descriptor over."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        with contextlib.suppress(OSError):  # the thread runs on the CPU that we leave; since Linux 6.6
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self) -> Notification | None:
        """The next notification; None if it has been withdrawn."""
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self.fd, _RECV, buffer, True)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        id_, tid, _, number, arch, ip, *arguments = _NOTIFICATION.unpack(buffer)
        return Notification(id_, tid, SystemCall(number, arch, ip, tuple(arguments)))

    def answer(self, id_: int, value: int) -> None:
        """The call's result, -errno included. Raises: Gone."""
        response = _RESPONSE.pack(id_, 0, value, 0) if -4096 < value < 0 else _RESPONSE.pack(id_, value, 0, 0)
        self._send(response)

    def take_back(self, id_: int) -> None:
        """Have the call end as an interrupted one, to be restarted. The thread must have a stop before it, for nobody
        else would hide that from it. Raises: Gone."""
        self._send(_RESPONSE.pack(id_, 0, -_ERESTARTSYS, 0))

    def let_run(self, id_: int) -> None:
        """Have the kernel do the call after all. Raises: Gone."""
        self._send(_RESPONSE.pack(id_, 0, 0, _CONTINUE))

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self.fd, _SEND, response)
        except OSError as error:
            if error.errno in _GONE:
                raise Gone from None
            raise

    def add_descriptor(self, id_: int, fd: int, number: int, cloexec: bool, answer: bool = False) -> None:
        """Open `fd` in the waiting process as `number`; with `answer` that is the call's result. Raises: Gone; OSError
        EBADF where the process may not have so many."""
        flags = _SETFD | (_SEND_TOO if answer else 0)
        argument = _ADDFD_ARGUMENT.pack(id_, flags, fd, number, os.O_CLOEXEC if cloexec else 0)
        try:
            fcntl.ioctl(self.fd, _ADDFD, argument)
        except OSError as error:
            if error.errno in _GONE:
                raise Gone from None
            raise

    def close(self) -> None:
        os.close(self.fd)
