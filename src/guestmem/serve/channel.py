"""Channel: one thread of a client, as the server sees it. Its calls become tasks; upcalls go the other way.

A thread makes one call at a time, so a channel has at most one call, and while that waits, at most one upcall. The
helper channel of a process has no calls of its own; whoever needs something done in that process takes turns on it.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from guestmem.sched import Operation, Task, park
from guestmem.serve import wire
from guestmem.serve.wire import Op, Request, Upcall

if TYPE_CHECKING:
    from guestmem.serve.client import Client

_ANCILLARY = socket.CMSG_SPACE(wire.MAX_FDS * 4)


class ClientGone(Exception):
    """The process cannot do an upcall any more: it has ended, or replaced its memory by exec."""


class UpcallResult(NamedTuple):
    """`error` is an errno or 0. Descriptors are the caller's to close."""

    error: int
    value: int
    payload: bytes
    fds: list[int]


class Channel:
    """`on_request(channel, request, fds)` gets what is no answer to an upcall. `task` is the call that is under way."""

    def __init__(self, sock: socket.socket, on_request: Callable[[Channel, Request, list[int]], None]) -> None:
        self.sock = sock
        self.client: Client | None = None
        self.task: Task[Any] | None = None
        self.open = True
        self._on_request = on_request
        self._upcall_under_way = False
        self._upcall_result: UpcallResult | None = None

    # From the client

    def receive(self) -> bool:
        """Take one message. False when the client has closed, or spoken what is no message."""
        try:
            data, ancillary, _, _ = self.sock.recvmsg(wire.MAX_MESSAGE, _ANCILLARY, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        fds = _descriptors(ancillary) if ancillary else []
        if len(data) < wire.HEADER:
            close_all(fds)
            return False
        request = wire.unpack_request(data)
        if request.op == Op.UPCALL_DONE:
            self._upcall_result = UpcallResult(request.a, request.b, request.payload, fds)
        elif request.op == Op.CANCEL:
            if self.task is not None:
                self.task.signal_pending = True
        else:
            self._on_request(self, request, fds)
        return True

    def is_connected(self) -> bool:
        """Whether the thread at the other end is still there."""
        try:
            return self.open and bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """The client is gone: what it waits for is interrupted, what waits for it is told."""
        self.open = False
        if self.task is not None:
            self.task.signal_pending = True
        self.sock.close()

    # To the client

    def answer(self, message: bytes, fds: list[int]) -> None:
        """Send an answer, and descriptors with it, which are closed here. A client that is gone misses it."""
        try:
            if fds:
                socket.send_fds(self.sock, [message], fds)
            else:
                self.sock.send(message)
        except OSError:
            pass
        finally:
            close_all(fds)

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
        """Have the thread at the other end do something. `fds` stay the caller's. Raises: ClientGone."""
        await park(Operation("upcall", op.name, lambda: not self._upcall_under_way or not self.open))
        if not self.open:
            raise ClientGone
        self._upcall_under_way = True
        self._upcall_result = None
        try:
            message = wire.pack_upcall(op, payload, a, b, c, d)
            try:
                if fds:
                    socket.send_fds(self.sock, [message], fds)
                else:
                    self.sock.send(message)
            except OSError as error:
                raise ClientGone from error
            await park(Operation("upcall done", op.name, lambda: self._upcall_result is not None or not self.open))
            if self._upcall_result is None:
                raise ClientGone
            return self._upcall_result
        finally:
            self._upcall_under_way = False


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def peer_pid(sock: socket.socket) -> int:
    """The process that connected."""
    pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
