"""The engine: each operation, what it does when a DMA faults, and that its memory is reached by its bus alone."""

from __future__ import annotations

import zlib

import pytest

from guestmem import Access, Descriptor, DmaFault
from guestmem.iommu.engine import MAX_BYTES, MAX_ENTRIES, DmaEngine, Operation, Status
from guestmem.memory import PAGE_SIZE
from tests.iommu.conftest import BASE, Io

K = PAGE_SIZE
RING = BASE + 7 * K


def test_every_operation(io: Io) -> None:
    io.map()
    io.view.write(0, bytes(range(256)) * 16)
    entries = (BASE + 100).to_bytes(8, "little") + (50).to_bytes(8, "little")
    entries += (BASE + 200).to_bytes(8, "little") + (8).to_bytes(8, "little")
    io.view.write(6 * K, entries)
    done = io.device.submit(
        RING,
        Descriptor(Operation.COPY, source=BASE + 10, target=BASE + K + K // 2, length=K - 10),
        Descriptor(Operation.FILL, target=BASE + 3 * K, length=2 * K, pattern=0x1FF),
        Descriptor(Operation.CHECKSUM, source=BASE, length=K),
        Descriptor(Operation.GATHER, source=BASE + 6 * K, target=BASE + 5 * K, length=2),
        Descriptor(Operation.SCATTER, source=BASE + 6 * K, target=BASE + 5 * K + 8, length=2),
        Descriptor(99, length=1),
    )
    assert [each.status for each in done] == [Status.DONE] * 5 + [Status.BAD]
    assert [each.result for each in done] == [K - 10, 2 * K, zlib.crc32(bytes(range(256)) * 16), 58, 58, 0]
    pattern = bytes(range(256)) * 16
    assert io.view.read(K + K // 2, K - 10) == pattern[10:]
    assert io.view.read(3 * K, 2 * K) == b"\xff" * 2 * K
    assert io.view.read(5 * K, 58) == pattern[100:150] + pattern[200:208]
    assert io.view.read(100, 50) == (pattern[108:150] + pattern[200:208]).ljust(50, b"\0")


def test_a_fault_says_where_and_the_next_descriptor_is_done(io: Io) -> None:
    io.map()
    io.gmem.convert(K, K, Access.PRIVATE)
    copy, fill = io.device.submit(
        RING,
        Descriptor(Operation.COPY, source=BASE, target=BASE + K - 8, length=16),
        Descriptor(Operation.FILL, target=BASE, length=1, pattern=3),
    )
    assert (copy.status, copy.fault, copy.result) == (Status.FAULT, BASE + K, 0)
    assert fill.status == Status.DONE and io.view[0] == 3


def test_a_ring_that_is_gone_stops_the_engine(io: Io) -> None:
    io.map()
    engine = DmaEngine(io.device.device, DmaFault)
    assert io.bench.run(engine.doorbell(RING + K - 64, 4, 0, 4)) == 1
    assert io.bench.run(engine.doorbell(8 * BASE, 4, 0, 4)) == 0


def test_a_ring_is_gone_round(io: Io) -> None:
    io.map()
    ring = b"".join(Descriptor(Operation.FILL, target=BASE + at, length=1, pattern=at + 1).pack() for at in range(4))
    io.view.write(7 * K, ring)
    engine = DmaEngine(io.device.device, DmaFault)
    assert io.bench.run(engine.doorbell(RING, 4, 3, 2)) == 2
    assert io.view.read(0, 4) == bytes((1, 0, 0, 4))


@pytest.mark.parametrize(
    "descriptor",
    [
        Descriptor(Operation.COPY, source=BASE, target=BASE, length=MAX_BYTES + 1),
        Descriptor(Operation.GATHER, source=BASE, target=BASE, length=MAX_ENTRIES + 1),
        Descriptor(0),
    ],
)
def test_what_no_engine_does(io: Io, descriptor: Descriptor) -> None:
    io.map()
    assert io.device.submit(RING, descriptor)[0].status == Status.BAD


def test_a_list_that_is_too_long_in_all_is_bad(io: Io) -> None:
    io.map()
    io.view.write(0, 2 * (BASE.to_bytes(8, "little") + MAX_BYTES.to_bytes(8, "little")))
    assert io.device.submit(RING, Descriptor(Operation.GATHER, BASE, BASE + K, 2))[0].status == Status.BAD


def test_a_trusted_device_works_in_private_memory_alone(io: Io) -> None:
    """Its ring included: nothing that the host could have written moves it."""
    trusted = io.plug(trusted=True)
    io.gmem.convert(0, 8 * K, Access.PRIVATE)
    io.map()
    (fill,) = trusted.submit(RING, Descriptor(Operation.FILL, target=BASE, length=K, pattern=5))
    assert fill.status == Status.DONE
    io.gmem.convert(0, K, Access.SHARED)
    assert io.view[0] == 5
    (again,) = trusted.submit(RING, Descriptor(Operation.FILL, target=BASE, length=K, pattern=6))
    assert (again.status, io.view[0]) == (Status.FAULT, 5)
