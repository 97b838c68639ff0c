"""AdoptedMemory: the address space of a traced client, whose vCPUs run here: its pages as memslots want them.

A memslot points at memory that the client made as it liked. When a vCPU first touches it the server needs the same
pages in its own address space:

- a mapping of a guest_memfd: the provider gives the page;
- a shared mapping of a file: the server maps the same file;
- private memory: the client is made to put a shared memfd in its place, contents kept (REPLACE), and the server maps
  that. Nothing of this happens when the slot is made: it may be huge and never be touched.

What is found is remembered as an area until the client says that it unmaps, moves or reprotects the range; before it
does so, KVM drops what it has mapped of it. What differs from a kernel by this is in docs/run/explanation.md.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from guestmem.kvm.vm import PinnedPage
from guestmem.memory import PAGE_SIZE, Access
from guestmem.memory.backing import map_window, unmap_window
from guestmem.sched import Operation, park
from guestmem.serve.channel import ClientGone
from guestmem.serve.client_memory import NO_PFN, Area, ClientMemory, HostPage
from guestmem.serve.gmem_mappings import PROT_READ, PROT_WRITE, GmemArea
from guestmem.serve.proc_maps import Vma, find_vma, open_mapped_file
from guestmem.serve.wire import Upcall
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client

_REPLACE_HUGETLB, _REPLACE_PRIVATE = 1, 2


class PinnedHostPage:
    """A page of `window`, by its file; the window, if it has one, stays mapped until it is put."""

    def __init__(self, window: Window, offset: int) -> None:
        self._window = window
        self._offset = offset
        window.pins += 1

    async def read(self, offset: int, size: int) -> bytes:
        """See kvm.vm.PinnedPage. By the file, since what was cut off it is a SIGBUS in the mapping."""
        return os.pread(self._window.fd, size, self._offset + offset).ljust(size, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        """See kvm.vm.PinnedPage."""
        inside = os.fstat(self._window.fd).st_size - self._offset - offset
        if inside > 0:
            os.pwrite(self._window.fd, data[:inside], self._offset + offset)

    def set_dirty(self) -> None:
        """Nothing to say: the file's own page was written."""

    def put(self) -> None:
        """Give it back; once."""
        self._window.pins -= 1


class HostArea:
    """Bytes `start`..`end` of the client are bytes of `window` here, from our address `base` on."""

    def __init__(self, start: int, end: int, prot: int, window: Window, base: int) -> None:
        self.start = start
        self.end = end
        self.prot = prot
        self.window = window
        self.base = base

    def cut(self, start: int, end: int) -> HostArea:
        return HostArea(start, end, self.prot, self.window, self.base + start - self.start)


class Window:
    """`size` bytes of the file `fd` from `offset` on, mapped here at `base`. `is_ours`: it stands in the place of
    private memory. `pins` count who needs it even when the client has it no more."""

    def __init__(self, fd: int, offset: int, size: int, is_ours: bool) -> None:
        self.size = size
        self.offset = offset
        self.is_ours = is_ours
        self.pins = 0
        try:
            self.base = map_window(fd, offset, size)
        except OSError:
            os.close(fd)
            raise
        self.fd = fd

    def close(self) -> None:
        unmap_window(self.base, self.size)
        os.close(self.fd)


class AdoptedMemory(ClientMemory):
    """The areas of one client that we know; `notifiers` are told when they change."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._windows: list[Window] = []
        self._adopting = False

    # HostAddressSpace: pages

    async def user_page(self, hva: int, write: bool) -> HostPage:
        """See kvm.vm.HostAddressSpace. Raises: Refusal EFAULT `user.page`."""
        area = self.area_at(hva) or await self._adopt(hva)
        if area is None or not area.prot & (PROT_WRITE if write else PROT_READ | PROT_WRITE):
            raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write)
        writable = bool(area.prot & PROT_WRITE)
        if isinstance(area, HostArea):
            window = area.window
            return HostPage(NO_PFN, area.base + hva - area.start, (window.base, window.size), writable)
        assert isinstance(area, GmemArea)
        inode = area.inode
        async with inode.invalidate_lock.shared:
            try:
                page = await inode.fault(area.mappings.registration, area.index_of(hva), Access.SHARED)
            except Refusal as refusal:
                raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write) from refusal
        return HostPage(page.pfn, page.hva, page.window, writable)

    async def pin_page(self, hva: int, write: bool) -> PinnedPage:
        """See kvm.vm.HostAddressSpace. Raises: Refusal EFAULT `user.page`."""
        await self.user_page(hva & -PAGE_SIZE, write)
        area = self.area_at(hva)
        if isinstance(area, HostArea):
            at = area.base - area.window.base + (hva & -PAGE_SIZE) - area.start
            return PinnedHostPage(area.window, area.window.offset + at)
        assert isinstance(area, GmemArea)
        return area.inode.folios.get(area.index_of(hva))

    # Areas

    async def tell_kvm(self, start: int, end: int) -> None:
        """Addresses are about to lose their pages: KVM drops what it has mapped of them (MMU notifier)."""
        for kvm in list(self.notifiers):
            await kvm.invalidate_range_start(start, end)
            await kvm.invalidate_range_end(start, end)

    async def unmap(self, start: int, end: int) -> None:
        """The range is about to be unmapped or replaced: KVM and we forget what was there."""
        await super().unmap(start, end)
        self._close_unused_windows()

    async def fork_of(self, parent: ClientMemory) -> None:
        """Memory that was private to the parent before we replaced it is private again here: what the child writes, the
        parent and its guests do not see."""
        await super().fork_of(parent)
        assert isinstance(parent, AdoptedMemory)
        for host in parent.replaced():
            size, offset = host.end - host.start, host.base - host.window.base
            await self.client.upcall(Upcall.PRIVATE, a=host.start, b=size, c=host.prot, d=offset, fds=(host.window.fd,))

    def end(self) -> None:
        """The client's memory is gone."""
        super().end()
        self.close_if_nobody_runs()

    def close_if_nobody_runs(self) -> None:
        """Give back the memory of a client that has ended, once no VM of it is left whose vCPUs may have it cached."""
        if not self.client.alive and not self.notifiers:
            self._close_unused_windows()

    def _close_unused_windows(self) -> None:
        """Unmap the windows that no area shows. KVM has dropped what it had mapped of them, and flushed its vCPUs."""
        shown = {id(area.window) for area in self.areas if isinstance(area, HostArea)}
        for window in [w for w in self._windows if not w.pins and id(w) not in shown]:
            self._windows.remove(window)
            window.close()

    def replaced(self) -> list[HostArea]:
        """The areas where we put a memfd of our own in the place of private memory."""
        return [area for area in self.areas if isinstance(area, HostArea) and area.window.is_ours]

    # Adoption

    async def _adopt(self, hva: int) -> Area | None:
        """Have the memory at `hva` in our own address space. None if the client has none that could be.

        One at a time: two vCPUs that touch the same new memory must end up with the same pages.
        """
        await park(Operation("adopt", self.client.name(), lambda: not self._adopting))
        if (found := self.area_at(hva)) is not None:
            return found
        self._adopting = True
        try:
            return await self._adopt_alone(hva)
        finally:
            self._adopting = False

    async def _adopt_alone(self, hva: int) -> Area | None:
        vma = find_vma(self.client.pid, hva)
        if vma is None or not vma.readable:
            return None
        start, end = self._bounds(vma, hva)
        try:
            area = await (self._share(vma) if vma.shared else self._replace(vma, start, end))
        except (ClientGone, OSError):
            return None
        return area if area is not None and area.start <= hva < area.end else None

    def _bounds(self, vma: Vma, hva: int) -> tuple[int, int]:
        """The part of a mapping around `hva` that memslots show: the rest of it is none of our business."""
        start, end = vma.start, vma.end
        for kvm in self.notifiers:
            bounds = kvm.hva_range_of_slot(hva)
            if bounds is not None:
                start, end = max(start, bounds[0]), min(end, bounds[1])
        free = [a for a in self.areas if a.start < end and start < a.end]
        start = max([start, *(a.end for a in free if a.end <= hva)])
        end = min([end, *(a.start for a in free if a.start > hva)])
        if vma.hugetlb:
            size = 2 << 20
            start, end = max(vma.start, start & -size), min(vma.end, -(-end // size) * size)
        return start, end

    async def _share(self, vma: Vma) -> Area | None:
        """Map the file that the client has mapped."""
        fd = open_mapped_file(self.client.pid, vma)
        if fd is None:
            return await self._replace(vma, vma.start, vma.end)
        window = Window(fd, vma.offset, vma.end - vma.start, is_ours=False)
        return self._adopted(vma, vma.start, vma.end, window)

    async def _replace(self, vma: Vma, start: int, end: int) -> Area | None:
        """Have the client put a memfd in the place of its private pages, and map that."""
        fd = os.memfd_create("guestmem:slot", os.MFD_CLOEXEC)
        os.ftruncate(fd, end - start)
        window = Window(fd, 0, end - start, is_ours=True)
        prot = PROT_READ | (PROT_WRITE if vma.writable else 0)
        flags = (_REPLACE_HUGETLB if vma.hugetlb else 0) | _REPLACE_PRIVATE
        try:
            result = await self.client.upcall(Upcall.REPLACE, a=start, b=end - start, c=prot, d=flags, fds=(fd,))
        except ClientGone:
            window.close()
            raise
        if result.error:
            window.close()
            return None
        return self._adopted(vma, start, end, window)

    def _adopted(self, vma: Vma, start: int, end: int, window: Window) -> HostArea:
        self._windows.append(window)
        self._take(start, end)
        prot = PROT_READ | (PROT_WRITE if vma.writable else 0)
        area = HostArea(start, end, prot, window, window.base)
        self.add(area)
        return area
