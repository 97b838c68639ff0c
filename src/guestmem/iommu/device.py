"""DmaDevice: what does DMA. Every byte that it reads or writes goes through the domain that it is attached to.

An access is cut at page borders. Each part is one translation and the copy, in one step; between two parts others may
run. What the domain does not map the device asks for, if it can (ATS and PRI: `page_requests`); otherwise, and where
the answer is no, the DMA faults, which is an event and an exception, and no byte of that page moves.

What is mapped is not all: the hardware that protects a guest's memory looks at each access too (`GmemLeaf.rules`). What
it refuses is a fault like others, or the end of the machine, which is an event of its own here.

Source: PCIe ATS and PRI as drivers/iommu/io-pgfault.c answers them.
"""

from __future__ import annotations

import dataclasses
import errno
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from guestmem.iommu.addresses import IoPage, Iova, io_page_of
from guestmem.iommu.domain import Domain
from guestmem.iommu.ioas import Ioas, check_permission
from guestmem.iommu.leaves import GmemLeaf, IoLeaf
from guestmem.memory import PAGE_SIZE, Pfn
from guestmem.sched import Lock, LockClass, Scheduler
from guestmem.trace import Refusal, Tracer
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.iommu.iommufd import Iommufd


MACHINE_CHECK = "dma.machine_check"
"""The rule of a DMA that stops the machine."""


class DmaFault(Exception):
    """A DMA that was not allowed. `iova` is the first byte that did not move, `done` how many moved before it."""

    def __init__(self, iova: Iova, write: bool, done: int, refusal: Refusal) -> None:
        self.iova = iova
        self.write = write
        self.done = done
        self.refusal = refusal
        super().__init__(f"DMA {'write' if write else 'read'} at {iova:#x}: {refusal}")


class Attachment(NamedTuple):
    """Where a device's accesses go."""

    ioas: Ioas
    domain: Domain


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Bytes since creation; DMAs that faulted, by the rule that refused them."""

    number: int
    bytes_read: int
    bytes_written: int
    faults: dict[str, int]


class DmaDevice:
    """`number` names it in traces. `lock` is held to attach and detach. `bound` is the iommufd that has it."""

    def __init__(self, scheduler: Scheduler, tracer: Tracer, number: int, page_requests: bool = True) -> None:
        self.number = number
        self.page_requests = page_requests
        self.lock = Lock(scheduler, LockClass.DEVICE_LOCK, f"device lock {number}")
        self.attachment: Attachment | None = None
        self.bound: Iommufd | None = None
        self._fault_counts: Counter[str] = Counter()
        self._bytes_read = 0
        self._bytes_written = 0
        self._scheduler = scheduler
        self._tracer = tracer

    async def read(self, iova: int, size: int) -> bytes:
        """Bytes. Raises: DmaFault, and what was read before it is lost."""
        parts = bytearray()
        while len(parts) < size:
            at = Iova(iova + len(parts))
            count = min(PAGE_SIZE - at % PAGE_SIZE, size - len(parts))
            parts += await self._access(at, False, len(parts), bytes(count))
            self._bytes_read += count
        return bytes(parts)

    async def write(self, iova: int, data: bytes) -> None:
        """Raises: DmaFault; what was written before it stays."""
        done = 0
        while done < len(data):
            at = Iova(iova + done)
            count = min(PAGE_SIZE - at % PAGE_SIZE, len(data) - done)
            await self._access(at, True, done, data[done : done + count])
            self._bytes_written += count
            done += count

    async def give_way(self) -> None:
        """Let others run, in every mode: a device is no reason for anybody to wait."""
        await self._scheduler.cond_resched("DMA in progress")

    async def _access(self, iova: Iova, write: bool, done: int, data: bytes) -> bytes:
        """Move bytes inside of a page, as many as `data` has; those that were read."""
        page = io_page_of(iova)
        while True:
            await self._scheduler.preempt("DMA")
            try:
                attachment = self.attachment
                if attachment is None:
                    raise Refusal(errno.EFAULT, "dma.not_attached", device=self.number)
                leaf = attachment.domain.translate(page)
                if leaf is not None:
                    return await _move(attachment.domain, leaf, iova, write, data)
                if not self.page_requests:
                    raise Refusal(errno.EFAULT, "dma.unmapped", iova=iova)
                await attachment.ioas.page_request(attachment.domain, page, write)
            except Refusal as refusal:
                self._fault(iova, write, refusal)
                raise DmaFault(iova, write, done, refusal) from refusal

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics(self.number, self._bytes_read, self._bytes_written, dict(self._fault_counts))

    def _fault(self, iova: Iova, write: bool, refusal: Refusal) -> None:
        self._fault_counts[refusal.rule] += 1
        if self._tracer.enabled:
            domain = self.attachment.domain.number if self.attachment else 0
            self._tracer.emit(event.IommuFault(domain, self.number, iova, write, refusal.rule))
            if refusal.rule == MACHINE_CHECK:
                self._tracer.emit(event.MachineCheck(self.number, iova))


async def _move(domain: Domain, leaf: IoLeaf, iova: Iova, write: bool, data: bytes) -> bytes:
    """In one step with the translation where the memory is here; that of a process stays pinned until it has moved."""
    page, offset = io_page_of(iova), iova % PAGE_SIZE
    check_permission(leaf, page, write)
    if leaf.rules is not None and not _moves_bytes(domain, leaf, page, write):
        return bytes(len(data))  # what a read finds that the hardware gives nothing else
    if not write:
        return await leaf.read(page, offset, len(data))
    await leaf.write(page, offset, data)
    return data


def _moves_bytes(domain: Domain, leaf: GmemLeaf, page: IoPage, write: bool) -> bool:
    """Ask the architecture. Raises: Refusal `dma.*`."""
    assert leaf.rules is not None
    pfn = Pfn(leaf.pfn + page - leaf.page)
    return leaf.rules.check(leaf.block, pfn, trusted=domain.trusted, write=write)
