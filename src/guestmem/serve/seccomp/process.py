"""Process: a memory that threads share, and what we know of it. vfork() has two share one, exec() makes a new."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from guestmem.sched import Operation, Task, park
from guestmem.serve.channel import ClientGone, UpcallResult
from guestmem.serve.client import Client
from guestmem.serve.gmem_mappings import GmemArea
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.stoppable import State
from guestmem.serve.seccomp.traced_client import TracedClient
from guestmem.serve.seccomp.tracee import Tracee
from guestmem.serve.seccomp.user_memory import take_descriptor
from guestmem.serve.wire import Upcall

if TYPE_CHECKING:
    from guestmem.serve.seccomp.supervisor import Supervisor

_USER_MODE_ONLY = 1
_UFFDIO_API, _UFFD_API = 0xC018AA3F, 0xAA
_SHMEM_FEATURES = 1 << 5 | 1 << 7 | 1 << 10
"""MISSING_SHMEM, SIGBUS, MINOR_SHMEM."""
_HUGETLB_FEATURES = 1 << 4 | 1 << 9


class Process:
    """`instruction`: where a system call has come from, so that there is an instruction that calls."""

    def __init__(self, supervisor: Supervisor, pid: int, instruction: int = 0) -> None:
        self.supervisor = supervisor
        self.pid = pid
        self.instruction = instruction
        self.tracees: set[Tracee] = set()
        self.frozen = 0
        self._client: Client | None = None
        self._guarded = False

    # The client that it is to the server, from its first call on

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = self.supervisor.server.new_client(self.pid, TracedClient)
            self._client.helper = Helper(self)
        return self._client

    @property
    def has_areas(self) -> bool:
        return self._client is not None and bool(self._client.memory.areas)

    def areas_touch(self, address: int, length: int, gmem: bool = False) -> bool:
        """Whether a range has to do with memory that the server knows, or with that of a guest_memfd."""
        if self._client is None:
            return False
        areas = self._client.memory.areas
        end = address + max(length, 1)
        return any(a.start < end and address < a.end and (not gmem or isinstance(a, GmemArea)) for a in areas)

    def remove(self, tracee: Tracee) -> None:
        """A thread is gone; the memory goes with the last."""
        self.tracees.discard(tracee)
        if not self.tracees and self._client is not None:
            self._client.end()

    # All threads

    @asynccontextmanager
    async def all_stopped(self) -> AsyncIterator[None]:
        """Nothing of the process runs, and no answer reaches it."""
        self.frozen += 1
        try:
            for tracee in self.tracees:
                if tracee.state is State.RUNNING:
                    tracee.interrupt()
            await park(Operation("freeze", self.pid, self._is_still))
            yield
        finally:
            self.frozen -= 1
            for tracee in list(self.tracees):
                tracee.thaw()

    async def thawed(self) -> None:
        """Wait until nobody counts on memory that does not change."""
        if self.frozen:
            await park(Operation("thaw", self.pid, lambda: not self.frozen))

    def _is_still(self) -> bool:
        """A thread in a notification, or one that waits for its vfork()ed child, does not run either."""
        return all(tracee.state is not State.RUNNING or tracee.in_vfork for tracee in self.tracees)

    # The guard

    async def prepare_guard(self, tracee: Tracee) -> None:
        """Before its first mapping of a guest_memfd: get its userfaultfd, or do with overlays. Raises: Gone."""
        if self._guarded:
            return
        async with tracee.held():
            flags = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
            number = await tracee.inject(Nr.USERFAULTFD, flags)
            if number < 0:
                self._guarded = True
                return
            try:
                fd: int | None = take_descriptor(tracee.tgid, number)
            except OSError:
                fd = None
            await tracee.inject(Nr.CLOSE, number)
        if fd is not None and _enable(fd):
            self.client.use_userfaultfd(fd)
        elif fd is not None:
            os.close(fd)
        self._guarded = True


def _enable(fd: int) -> bool:
    for features in (_SHMEM_FEATURES | _HUGETLB_FEATURES, _SHMEM_FEATURES):
        try:
            fcntl.ioctl(fd, _UFFDIO_API, struct.pack("<QQQ", _UFFD_API, features, 0))
        except OSError:
            continue
        return True
    return False


class Helper:
    """Any thread of a process, for upcalls outside of its calls. See guestmem.serve.client_thread."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.task: Task[Any] | None = None

    @property
    def client(self) -> Client | None:
        return self._process.client

    @property
    def open(self) -> bool:
        return bool(self._process.tracees)

    def answer(self, message: bytes, fds: list[int]) -> None:
        raise AssertionError("a helper makes no calls")

    async def upcall(
        self,
        op: Upcall,
        payload: bytes = b"",
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: tuple[int, ...] = (),
    ) -> UpcallResult:
        """Raises: ClientGone."""
        while True:
            tracee = self._choose()
            try:
                return await tracee.upcall(op, payload, a, b, c, d, fds)
            except ClientGone:
                if not tracee.dead:
                    raise

    def _choose(self) -> Tracee:
        """A thread that is stopped already, else one outside of a call, else one that can be interrupted."""
        candidates = [tracee for tracee in self._process.tracees if not tracee.in_vfork]
        if not candidates:
            raise ClientGone
        return min(candidates, key=lambda t: (t.state is not State.STOPPED, t.call is not None, t.tid))
