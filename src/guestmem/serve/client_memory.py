"""ClientMemory: a client's address space, which KVM uses where it is, by the client's own page tables.

The vCPUs of a client run in its threads (`client_cpus`), so what stands behind a memslot is never mapped here: a leaf
names the client's address, and whether the memory can be touched is found out by touching it, as under a kernel. What
KVM itself reads or writes, and what a device's DMA moves, a thread of the client copies. Mappings of guest_memfds are
known, since their pages can be taken away (`gmem_mappings`).

Clients whose calls are traced have no thread that could do this: see `seccomp.adopted_memory`.
"""

from __future__ import annotations

import bisect
import errno
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from guestmem.kvm.stage2 import USER_MEMORY
from guestmem.kvm.vm import PinnedPage
from guestmem.memory import PAGE_SIZE, Pfn
from guestmem.serve import wire
from guestmem.serve.channel import ClientGone
from guestmem.serve.gmem_mappings import GmemArea
from guestmem.serve.pins import pin_memory
from guestmem.serve.wire import Upcall
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client

NO_PFN = Pfn(0)
"""Page number of memory that is no guest_memfd's: page 0 is nobody's."""
_USER_ORDER = 18  # a slot's memory lies at consecutive addresses, however the client has put it together


class HostPage(NamedTuple):
    """See kvm.vm.HostPage."""

    pfn: Pfn
    hva: int
    window: tuple[int, int]
    writable: bool
    order: int = 0


class Area(Protocol):
    """Bytes `start`..`end` of the client that the server knows."""

    start: int
    end: int
    prot: int

    def cut(self, start: int, end: int) -> Area:
        """The part between two addresses, as an area of its own."""
        ...


class ClientMemory:
    """What is known of one client's mappings, by address: those of guest_memfds. `notifiers` are its VMs."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.areas: list[Area] = []
        self.notifiers: list[Any] = []

    # HostAddressSpace: pages

    async def user_page(self, hva: int, write: bool) -> HostPage:
        """See kvm.vm.HostAddressSpace. Never refuses: the access itself does."""
        return HostPage(NO_PFN, hva & -PAGE_SIZE, USER_MEMORY, True, _USER_ORDER)

    async def pin_page(self, hva: int, write: bool) -> PinnedPage:
        """See kvm.vm.HostAddressSpace. Raises: Refusal EFAULT `user.page`."""
        return await pin_memory(self.client, hva & -PAGE_SIZE, write)

    # HostAddressSpace: arguments of calls

    async def copy_from_user(self, hva: int, size: int) -> bytes:
        """What came with the call, or what a thread of the client reads for us. Raises: Refusal EFAULT `user.copy`."""
        call = self.client.server.current_call()
        if call is not None and (inline := call.argument_bytes(hva, size)) is not None:
            return inline
        parts = []
        for at in range(hva, hva + size, wire.MAX_COPY):
            count = min(wire.MAX_COPY, hva + size - at)
            result = await self._upcall(Upcall.READ, hva, size, a=at, b=count)
            parts.append(result.payload[:count].ljust(count, b"\0"))
        return b"".join(parts)

    async def copy_to_user(self, hva: int, data: bytes) -> None:
        """With the answer, or by a thread of the client at once. Raises: Refusal EFAULT `user.copy`."""
        call = self.client.server.current_call()
        if call is not None and call.put_argument_bytes(hva, data):
            return
        for done in range(0, len(data), wire.MAX_COPY):
            part = data[done : done + wire.MAX_COPY]
            await self._upcall(Upcall.WRITE, hva, len(data), payload=part, a=hva + done)

    async def _upcall(self, op: Upcall, hva: int, size: int, payload: bytes = b"", a: int = 0, b: int = 0) -> Any:
        try:
            result = await self.client.upcall(op, payload, a, b)
        except ClientGone:
            raise Refusal(errno.EFAULT, "user.copy", hva=hva, size=size) from None
        if result.error:
            raise Refusal(errno.EFAULT, "user.copy", hva=hva, size=size)
        return result

    # Areas

    def area_at(self, hva: int) -> Area | None:
        place = bisect.bisect_right(self.areas, hva, key=_start) - 1
        return self.areas[place] if place >= 0 and hva < self.areas[place].end else None

    def add(self, area: Area) -> None:
        bisect.insort(self.areas, area, key=_start)

    async def tell_kvm(self, start: int, end: int) -> None:
        """Addresses are about to lose their pages. Nothing to do: vCPUs reach them through these very mappings."""

    async def unmap(self, start: int, end: int) -> None:
        """The range is about to be unmapped or replaced: forget what was there."""
        await self.tell_kvm(start, end)
        self._take(start, end)

    async def protect(self, start: int, end: int, prot: int) -> None:
        """mprotect(2) of the range."""
        await self.tell_kvm(start, end)
        for area in self._take(start, end):
            area.prot = prot
            self._attach(area)

    def _take(self, start: int, end: int) -> list[Area]:
        taken = []
        for area in [a for a in self.areas if a.start < end and start < a.end]:
            self.areas.remove(area)
            if isinstance(area, GmemArea):
                area.mappings.detach(area)
            for low, high in ((area.start, start), (end, area.end)):
                if low < high:
                    self._attach(area.cut(low, high))
            taken.append(area.cut(max(area.start, start), min(area.end, end)))
        return taken

    def _attach(self, area: Area) -> None:
        self.add(area)
        if isinstance(area, GmemArea):
            area.mappings.areas.append(area)

    async def fork_of(self, parent: ClientMemory) -> None:
        """This process was forked from another: it has the same mappings, and may not have run since.

        A private page is no more its own than its parent's.
        """
        for area in list(parent.areas):
            if isinstance(area, GmemArea):
                twin = GmemArea(self.client, area.mappings, area.start, area.end, area.first, area.prot)
                self.add(twin)
                await area.mappings.attach(twin)

    def end(self) -> None:
        """The client's memory is gone."""
        for area in self.areas:
            if isinstance(area, GmemArea):
                area.mappings.detach(area)
        self.areas.clear()

    def close_if_nobody_runs(self) -> None:
        """Nothing of it is here."""


def _start(area: Area) -> int:
    return area.start
