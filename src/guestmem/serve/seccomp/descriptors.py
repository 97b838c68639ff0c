"""Which descriptors of a client are files of ours: the file decides, by its inode number, not the number."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from guestmem.serve.files import ServedFile
from guestmem.serve.views import file_id

if TYPE_CHECKING:
    from guestmem.serve.seccomp.tracee import Tracee


def as_int(word: int) -> int:
    """A C int argument, of which the kernel looks at the low half."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word


def as_long(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class Known:
    """Descriptors that have been looked up, from where the filter has us hear of everything that closes one."""

    def __init__(self, first_fd: int) -> None:
        self._first = first_fd
        self._found: dict[tuple[int, int], ServedFile] = {}  # by process and number

    def get(self, pid: int, fd: int) -> ServedFile | None:
        found = self._found.get((pid, fd))
        return found if found is not None and not found.closed else None

    def put(self, pid: int, fd: int, file: ServedFile) -> None:
        if fd >= self._first:
            self._found[pid, fd] = file

    def forget(self) -> None:
        """Some descriptor is closed, some process has called exec or ended."""
        self._found.clear()


def file_at(tracee: Tracee, word: int) -> ServedFile | None:
    """What the argument of a call refers to; None for all that is not ours."""
    fd = as_int(word)
    if fd < 0:
        return None
    known = tracee.supervisor.known
    found = known.get(tracee.tgid, fd) or _look_up(tracee, fd)
    if found is not None:
        known.put(tracee.tgid, fd, found)
    return found


def _look_up(tracee: Tracee, fd: int) -> ServedFile | None:
    try:
        status = os.stat(f"/proc/{tracee.tid}/fd/{fd}")
    except OSError:
        return None
    files = tracee.supervisor.server.files
    if stat.S_ISSOCK(status.st_mode) or status.st_dev == files.gmem_device:
        return files.get(number_of(tracee, fd, status.st_ino))
    return None


def number_of(tracee: Tracee, fd: int, st_ino: int) -> int:
    """The number of a file: of a guest_memfd that has been linked, with its view."""
    if not tracee.supervisor.server.files.views.has_several(st_ino):
        return st_ino
    with open(f"/proc/{tracee.tid}/fdinfo/{fd}") as info:
        position = next((int(line.split()[1]) for line in info if line.startswith("pos:")), 0)
    return file_id(st_ino, position)
