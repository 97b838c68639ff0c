"""Views: the open files of guest_memfds in clients, several of which may be of one memfd.

Which view a descriptor is: its file position, which dup, fork, exec and SCM_RIGHTS keep, and which no call moves, since
a guest_memfd cannot be read, written or sought.

When a view is closed: inotify says that some open file of the inode is gone, an open file description lock
(F_OFD_SETLK) says which. The lock belongs to the open file, not to a process, and goes with it, mappings included; it
is taken when the memory is linked, and a file that is never linked has none. The kernel sends the event a moment before
it drops the lock, and merges events that nobody has read yet; so after an event of an inode that has several views they
are all looked at, again after a while, and whenever a client waits for a close of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestmem.serve.files import GmemFile

VIEW_SHIFT = 48
"""A view's file number is its st_ino with the view's number above it: st_ino are counted up from 1."""
_MAX_VIEW = 1 << 15

_libc = ctypes.CDLL(None, use_errno=True)
_IN_CLOSE_WRITE = 0x8
_EVENT = struct.Struct("iIII")
_FLOCK = struct.Struct("hh4xqqi4x")
_FIRST_BYTE = 1 << 62
_LOOK_AGAIN_FOR = 1.0
_FIRST_NAP = 0.001


def file_id(st_ino: int, view: int) -> int:
    """The number by which an open guest_memfd is known. Other memfds may have any position."""
    return st_ino | (view if 0 < view < _MAX_VIEW else 0) << VIEW_SHIFT


class _Inode:
    """The open files of one memfd. `linked` from the second on, of this server or of one before: an event says too
    little then."""

    def __init__(self, st_ino: int, backing_fd: int) -> None:
        self.st_ino = st_ino
        self.backing_fd = backing_fd
        self.open: list[GmemFile] = []
        self.views = 0
        self.linked = False
        self.look_until = 0.0
        self.nap = 0.0
        self.look_at = 0.0


class Views:
    """`inotify` is readable when some view may have been closed."""

    def __init__(self) -> None:
        self.inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.doubtful: set[int] = set()
        self._base = _FIRST_BYTE + (secrets.randbits(40) << 16)  # another server's clients may have the memory open
        self._watched: dict[int, _Inode] = {}
        self._inodes: dict[int, _Inode] = {}  # by st_ino

    def open(self, file: GmemFile, backing_fd: int, adopted: bool = False) -> int:
        """Open `file` for a client; the descriptor. `adopted`: clients of a server before may have the memory open. If
        it is open here, the views that there are have been locked. Raises: OSError."""
        path = f"/proc/self/fd/{backing_fd}"
        # Opened for writing and watched for the end of that: whoever looks at the file in between only reads.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            st_ino = os.fstat(fd).st_ino
            inode = self._inodes.get(st_ino) or _Inode(st_ino, backing_fd)
            file.view = self._number(inode)
            os.lseek(fd, file.view, os.SEEK_SET)
            if inode.open or inode.linked or adopted:
                assert all(other.locked for other in inode.open), "linked before it was locked"
                self.lock(file, fd)
                inode.linked = True
            watch = _libc.inotify_add_watch(self.inotify, path.encode(), _IN_CLOSE_WRITE)
            if watch < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
        except OSError:
            os.close(fd)
            raise
        inode.views += 1
        inode.open.append(file)
        self._inodes[st_ino] = self._watched[watch] = inode
        return fd

    def lock(self, file: GmemFile, fd: int) -> None:
        """From now on the end of `file` can be told from that of another view; `fd` is any descriptor of it. Raises:
        OSError."""
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(self._base + file.view))
        file.locked = True

    def _number(self, inode: _Inode) -> int:
        taken = {file.view for file in inode.open}
        return next(view for view in (n % _MAX_VIEW for n in range(inode.views, 1 << 17)) if view not in taken)

    def has_several(self, st_ino: int) -> bool:
        """Whether a descriptor's position must be asked to know the view."""
        inode = self._inodes.get(st_ino)
        return inode is not None and inode.linked

    def any_of(self, st_ino: int) -> GmemFile | None:
        """Some view of a memfd."""
        inode = self._inodes.get(st_ino)
        return inode.open[0] if inode is not None else None

    def closed(self) -> list[GmemFile]:
        """The guest_memfds whose last descriptor and mapping have gone since the last call, as far as is known."""
        found: list[GmemFile] = []
        for watch in self._events():
            inode = self._watched.get(watch)
            if inode is None:
                continue
            if not inode.linked:
                found += inode.open
                self._gone(watch, inode, inode.open)
                continue
            now = time.monotonic()
            inode.look_until, inode.nap, inode.look_at = now + _LOOK_AGAIN_FOR, _FIRST_NAP, now
            self.doubtful.add(watch)
        return found + self.look_again()

    def look_again(self) -> list[GmemFile]:
        """Those of whose inodes there was an event a moment ago, and whose time to look has come."""
        now = time.monotonic()
        found = []
        for watch in [watch for watch in self.doubtful if self._watched[watch].look_at <= now]:
            found += self._look(watch)
            inode = self._watched.get(watch)
            if inode is None or now > inode.look_until:
                self.doubtful.discard(watch)
            else:
                inode.look_at = now + inode.nap
                inode.nap *= 2
        return found

    def look_at_all(self) -> list[GmemFile]:
        """For a client that has closed something: its lock is gone when close() returns."""
        return [file for watch, inode in list(self._watched.items()) if inode.linked for file in self._look(watch)]

    def nap_ms(self) -> int | None:
        """How long nothing needs to be looked at; None if for ever."""
        if not self.doubtful:
            return None
        soonest = min(self._watched[watch].look_at for watch in self.doubtful)
        return max(int((soonest - time.monotonic()) * 1000) + 1, 0)

    def close(self) -> None:
        os.close(self.inotify)

    def _events(self) -> list[int]:
        try:
            events = os.read(self.inotify, 64 << 10)
        except BlockingIOError:
            return []
        watches = []
        while events:
            watch, _, _, length = _EVENT.unpack_from(events)
            events = events[_EVENT.size + length :]
            watches.append(watch)
        return watches

    def _look(self, watch: int) -> list[GmemFile]:
        inode = self._watched[watch]
        found = [file for file in inode.open if not _is_locked(inode.backing_fd, self._base + file.view)]
        self._gone(watch, inode, found)
        return found

    def _gone(self, watch: int, inode: _Inode, files: list[GmemFile]) -> None:
        inode.open = [file for file in inode.open if file not in files]
        if not inode.open:
            self.doubtful.discard(watch)
            del self._watched[watch], self._inodes[inode.st_ino]
            with contextlib.suppress(OSError):
                _libc.inotify_rm_watch(self.inotify, watch)


def _lock(byte: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)


def _is_locked(fd: int, byte: int) -> bool:
    """Whether an open file, other than that of `fd`, has locked this byte."""
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(byte)))
    return bool(kind != fcntl.F_UNLCK)
