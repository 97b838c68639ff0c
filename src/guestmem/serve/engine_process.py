"""EngineProcess: a DMA engine in a process of its own, as the server sees it.

The process is started by the first doorbell. It holds one end of a socket pair and nothing else: no page of any guest,
no descriptor of one. What it reads and writes is done here, page by page through the domain that its device is attached
to at that moment; it gets bytes, or the address at which its DMA faulted. A process that dies, or that says what is no
message, is a device that does no DMA any more.
"""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from guestmem.iommu import DmaDevice, DmaFault
from guestmem.sched import Operation, park
from guestmem.serve.dma_process import DOORBELL, HEADER, MAX_MESSAGE, Message
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.server import Server


class EngineProcess:
    """One for each open device file. One doorbell at a time."""

    def __init__(self, server: Server, device: DmaDevice) -> None:
        self._server = server
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._inbox: list[bytes] = []
        self._busy = False
        self._dead = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def doorbell(self, ring: int, entries: int, first: int, count: int) -> int:
        """See DmaEngine.doorbell. Raises: Refusal EIO `vfio.dead`."""
        await park(Operation("doorbell", self._device.number, lambda: not self._busy))
        self._busy = True
        try:
            if self._process is None:
                self._start()
            self._send(Message.DOORBELL, data=DOORBELL.pack(ring, entries, first, count))
            while True:
                operation, a, b, data = await self._receive()
                if operation == Message.DONE:
                    return a
                await self._answer(operation, a, b, data)
        finally:
            self._busy = False

    async def _answer(self, operation: int, size: int, iova: int, data: bytes) -> None:
        try:
            if operation == Message.READ and size <= MAX_MESSAGE - HEADER.size:
                self._send(Message.OK, data=await self._device.read(iova, size))
            elif operation == Message.WRITE:
                await self._device.write(iova, data)
                self._send(Message.OK)
            else:
                self._die()
        except DmaFault as fault:
            self._send(Message.FAULT, b=fault.iova)

    def close(self) -> None:
        """The device file is closed: the process goes."""
        self._die()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "guestmem.serve.dma_process", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._server.watch(self._sock.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            message = self._sock.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if len(message) < HEADER.size:
            self._die()
        else:
            self._inbox.append(message)

    def _die(self) -> None:
        self._dead = True
        if self._sock is not None:
            self._server.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _send(self, operation: Message, a: int = 0, b: int = 0, data: bytes = b"") -> None:
        if self._sock is not None:
            try:
                self._sock.send(HEADER.pack(operation, 0, a, b) + data)
            except OSError:
                self._die()

    async def _receive(self) -> tuple[int, int, int, bytes]:
        await park(Operation("engine", self._device.number, lambda: bool(self._inbox) or self._dead))
        if not self._inbox:
            raise Refusal(errno.EIO, "vfio.dead", device=self._device.number)
        message = self._inbox.pop(0)
        operation, _, a, b = HEADER.unpack_from(message)
        return operation, a, b, message[HEADER.size :]
