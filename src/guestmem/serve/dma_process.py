"""The process of a DMA engine: it has one socket, and gets through it what its device's domain lets it have.

    python -m guestmem.serve.dma_process FD

Messages have a header of four words, operation, 0, a and b, and bytes behind it. From the server: DOORBELL with four
numbers, then the answers to what the engine asks for. To the server: READ a bytes at b, WRITE bytes at b, DONE a. An
answer is OK with the bytes, or FAULT with the IOVA at which it faulted.
"""

from __future__ import annotations

import enum
import socket
import struct
import sys

from guestmem.iommu.addresses import Iova
from guestmem.iommu.engine import CHUNK, DmaEngine

HEADER = struct.Struct("<IIQQ")
DOORBELL = struct.Struct("<QQQQ")
MAX_MESSAGE = HEADER.size + CHUNK


class Message(enum.IntEnum):
    """What a message is."""

    DOORBELL = 1
    READ = 2
    WRITE = 3
    DONE = 4
    OK = 5
    FAULT = 6


class Fault(Exception):
    """The server has said no."""

    def __init__(self, iova: int) -> None:
        self.iova = Iova(iova)
        super().__init__(f"DMA fault at {iova:#x}")


class Gone(Exception):
    """The server has closed."""


class RemoteBus:
    """Memory as the server lets it be reached: each access is one exchange."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def receive(self) -> tuple[int, int, int, bytes]:
        """(operation, a, b, bytes). Raises: Gone."""
        data = self.sock.recv(MAX_MESSAGE)
        if len(data) < HEADER.size:
            raise Gone
        operation, _, a, b = HEADER.unpack_from(data)
        return operation, a, b, data[HEADER.size :]

    def send(self, operation: Message, a: int = 0, b: int = 0, data: bytes = b"") -> None:
        self.sock.send(HEADER.pack(operation, 0, a, b) + data)

    async def read(self, iova: int, size: int) -> bytes:
        return self._exchange(Message.READ, size, iova)

    async def write(self, iova: int, data: bytes) -> None:
        self._exchange(Message.WRITE, len(data), iova, data)

    def _exchange(self, operation: Message, a: int, b: int, data: bytes = b"") -> bytes:
        self.send(operation, a, b, data)
        answer, _, iova, found = self.receive()
        if answer == Message.FAULT:
            raise Fault(iova)
        return found


def main(fd: int) -> None:
    """Work on doorbells until the server closes."""
    bus = RemoteBus(socket.socket(fileno=fd))
    engine = DmaEngine(bus, Fault)
    try:
        while True:
            operation, _, _, data = bus.receive()
            if operation == Message.DOORBELL:
                bus.send(Message.DONE, _run(engine, *DOORBELL.unpack(data)))
    except (Gone, OSError):
        return


def _run(engine: DmaEngine, ring: int, entries: int, first: int, count: int) -> int:
    """Nothing in this process waits but on the socket, so the coroutine runs through."""
    coroutine = engine.doorbell(ring, entries, first, count)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return int(end.value)
    raise AssertionError("an engine of its own waits for nobody")


if __name__ == "__main__":
    main(int(sys.argv[1]))
