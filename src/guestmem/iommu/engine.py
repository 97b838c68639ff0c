"""DmaEngine: a small copy engine with a ring of descriptors, the device of examples, tests and clients.

Its driver puts descriptors into a ring in memory that the device reaches by DMA, and rings the doorbell with how many.
The engine takes one after another, and writes status and result back into each. Everything that it touches, the ring
included, it touches by its bus; so it runs where that bus is: in this process on a `DmaDevice`, or in a process of its
own that gets nothing but bytes (serve.dma_process).

A descriptor is 64 bytes, little-endian:

    0  u32 operation     1 copy, 2 fill, 3 checksum, 4 gather, 5 scatter
    4  u32 status        0 not done, 1 done, 2 a DMA faulted, 3 no such operation
    8  u64 source        IOVA; of gather and scatter: of the list, see below
    16 u64 target        IOVA; of gather and scatter: of the contiguous bytes
    24 u64 length        bytes; of gather and scatter: entries of the list
    32 u64 pattern       fill: the byte in its lowest eight bits
    40 u64 result        checksum: CRC-32 as zlib has it; others: bytes moved
    48 u64 fault         the IOVA at which a DMA faulted
    56 u64 reserved

A list has entries of two u64, IOVA and bytes. Gather moves from the entries to the contiguous bytes, scatter back.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from guestmem.iommu.addresses import Iova

CHUNK = 64 << 10
"""Bytes that one transfer on the bus has at most."""
MAX_BYTES = 1 << 30
"""Of one descriptor, and of the entries of one list together."""
MAX_ENTRIES = 4096


class BusFault(Exception):
    """What the bus raises for an access that the engine may not make. `iova` is the first byte that did not move."""

    iova: Iova


class Bus(Protocol):
    """How an engine reaches memory."""

    async def read(self, iova: int, size: int) -> bytes:
        """Raises: an exception with `iova` (see BusFault)."""
        ...

    async def write(self, iova: int, data: bytes) -> None:
        """Raises: as `read`."""
        ...


class Operation(enum.IntEnum):
    """What a descriptor asks for."""

    COPY = 1
    FILL = 2
    CHECKSUM = 3
    GATHER = 4
    SCATTER = 5


class Status(enum.IntEnum):
    """What became of a descriptor."""

    PENDING = 0
    DONE = 1
    FAULT = 2
    BAD = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptor:
    """One entry of the ring; see above."""

    operation: int
    source: int = 0
    target: int = 0
    length: int = 0
    pattern: int = 0
    status: int = Status.PENDING
    result: int = 0
    fault: int = 0

    def pack(self) -> bytes:
        return _DESCRIPTOR.pack(
            self.operation,
            self.status,
            self.source,
            self.target,
            self.length,
            self.pattern,
            self.result,
            self.fault,
            0,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Descriptor:
        operation, status, source, target, length, pattern, result, fault, _ = _DESCRIPTOR.unpack(data)
        return cls(operation, source, target, length, pattern, status, result, fault)


_DESCRIPTOR = struct.Struct("<II7Q")
_ENTRY = struct.Struct("<QQ")
DESCRIPTOR_SIZE = _DESCRIPTOR.size
_STATUS_AT, _RESULT_AT = 4, 40


class Bad(Exception):
    """No engine does what the descriptor asks for."""


class DmaEngine:
    """`faults` is what the bus raises. `pause` is awaited between the accesses of an operation: others may run
    there."""

    def __init__(self, bus: Bus, faults: type[Exception], pause: Callable[[], Awaitable[None]] | None = None) -> None:
        self._bus = bus
        self._bus_faults = faults
        self._pause = pause or _do_not_pause

    async def doorbell(self, ring: int, entries: int, first: int, count: int) -> int:
        """Work on `count` descriptors from the `first` on, round the ring of `entries` at IOVA `ring`; how many have a
        status now.

        Less than `count` if the ring itself cannot be reached.
        """
        for done in range(count):
            at = ring + (first + done) % entries * DESCRIPTOR_SIZE
            try:
                await self._work(at, Descriptor.unpack(await self._bus.read(at, DESCRIPTOR_SIZE)))
            except self._bus_faults:
                return done
            await self._pause()
        return count

    async def _work(self, at: int, descriptor: Descriptor) -> None:
        """Do one and write what became of it: the result first, so that whoever sees the status sees the result."""
        status, result, fault = Status.DONE, 0, 0
        try:
            result = await self._do(descriptor)
        except Bad:
            status = Status.BAD
        except self._bus_faults as error:
            status, fault = Status.FAULT, error.iova  # type: ignore[attr-defined]
        await self._bus.write(at + _RESULT_AT, struct.pack("<QQ", result, fault))
        await self._bus.write(at + _STATUS_AT, struct.pack("<I", status))

    async def _do(self, what: Descriptor) -> int:
        if what.length > MAX_BYTES or what.operation not in _OPERATIONS:
            raise Bad
        match Operation(what.operation):
            case Operation.COPY:
                return await self._copy(what.source, what.target, what.length)
            case Operation.FILL:
                return await self._fill(what.target, what.length, what.pattern & 0xFF)
            case Operation.CHECKSUM:
                return await self._checksum(what.source, what.length)
            case Operation.GATHER | Operation.SCATTER:
                return await self._list(what, gather=what.operation == Operation.GATHER)

    async def _copy(self, source: int, target: int, length: int) -> int:
        for done in range(0, length, CHUNK):
            data = await self._bus.read(source + done, min(CHUNK, length - done))
            await self._pause()
            await self._bus.write(target + done, data)
        return length

    async def _fill(self, target: int, length: int, byte: int) -> int:
        for done in range(0, length, CHUNK):
            await self._bus.write(target + done, bytes([byte]) * min(CHUNK, length - done))
        return length

    async def _checksum(self, source: int, length: int) -> int:
        checksum = 0
        for done in range(0, length, CHUNK):
            checksum = zlib.crc32(await self._bus.read(source + done, min(CHUNK, length - done)), checksum)
        return checksum

    async def _list(self, what: Descriptor, gather: bool) -> int:
        if what.length > MAX_ENTRIES:
            raise Bad
        data = await self._bus.read(what.source, what.length * _ENTRY.size)
        entries = list(_ENTRY.iter_unpack(data))
        if sum(length for _, length in entries) > MAX_BYTES:
            raise Bad
        place = what.target
        for iova, length in entries:
            source, target = (iova, place) if gather else (place, iova)
            await self._copy(source, target, length)
            place += length
        return place - what.target


async def _do_not_pause() -> None:
    """A bus that nobody else waits for."""


_OPERATIONS = frozenset(Operation)
