"""Client: one process that has memory of its own (an mm). Its channels, its userfaultfd, its memory, its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guestmem.sched import Operation, park
from guestmem.serve.channel import Channel, ClientGone, UpcallResult
from guestmem.serve.client_memory import ClientMemory
from guestmem.serve.client_thread import ClientThread
from guestmem.serve.guard import Guard, Overlay, Userfaultfd
from guestmem.serve.wire import Upcall

if TYPE_CHECKING:
    from guestmem.serve.server import Server


class Client:
    """`number` is never used again; `pid` may be. An exec makes a new client of the same process. `runs_vcpus`: its
    threads do; those of a client that is traced cannot."""

    runs_vcpus = True

    def __init__(self, server: Server, number: int, pid: int) -> None:
        self.server = server
        self.number = number
        self.pid = pid
        self.channels: set[Channel] = set()
        self.helper: ClientThread | None = None
        self.alive = True
        self.memory = ClientMemory(self)
        self.guard: Guard = Overlay(self)

    def use_userfaultfd(self, fd: int) -> None:
        """Guard mappings with this descriptor of the process's own memory from now on. Takes it over."""
        self.guard.close()
        self.guard = Userfaultfd(self, fd)

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
        """Have a thread of this process do something: the one that makes the current call, else the helper.

        Raises: ClientGone.
        """
        channel = await self._thread()
        return await channel.upcall(op, payload, a, b, c, d, fds)

    async def _thread(self) -> ClientThread:
        call = self.server.current_call()
        if call is not None and call.channel.client is self and call.channel.open:
            return call.channel
        # A forked child has its mappings a moment before its helper.
        await park(Operation("helper", self.pid, lambda: self.helper is not None or not self.alive))
        if self.helper is None or not self.helper.open:
            raise ClientGone
        return self.helper

    def end(self) -> None:
        """The process, or its memory, is no more. Its files are released by themselves, as their last descriptor goes.
        Idempotent."""
        if not self.alive:
            return
        self.alive = False
        self.memory.end()
        self.guard.close()

    def name(self) -> str:
        try:
            with open(f"/proc/{self.pid}/comm") as file:
                return file.read().strip()
        except OSError:
            return f"pid {self.pid}"

    def proc(self, path: str) -> str:
        """A path in the process's directory of /proc."""
        return os.path.join(f"/proc/{self.pid}", path)
