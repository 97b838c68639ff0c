"""Stage 2: which guest frames are mapped, to what, and the window that keeps stale look-ups out.

Two tables, one for each access, as TDX's mirror and shared EPT are: an invalidation of one kind of mapping is a zap in
one table. `mmu_lock` guards the tables and the window. A leaf is installed only through `install`, which asks the
window first; so what `zap` removed inside a window cannot come back before the window closes (S3).

Source: arch/x86/kvm/mmu/tdp_mmu.c and virt/kvm/kvm_main.c in effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from guestmem.cpu.engine import HostWindow, PageBit, Translation
from guestmem.kvm.addresses import Gfn, gfn_of
from guestmem.memory import PAGE_SHIFT, Access, Inode, PageTable, Pfn, Range, Window
from guestmem.sched import Lock, LockClass, Scheduler
from guestmem.trace import Tracer
from guestmem.trace import events as event


class Leaf(NamedTuple):
    """A stage-2 entry over 2**order frames from `gfn` on. `hva` is the server's address of the first byte."""

    gfn: Gfn
    order: int
    pfn: Pfn
    hva: int
    window: tuple[int, int]
    writable: bool

    def __fingerprint__(self) -> tuple[int, int, int, bool]:
        """Without addresses: where the host put the file is not state."""
        return self.gfn, self.order, self.pfn, self.writable


USER_MEMORY = (0, 1 << 47)
"""The window of a leaf whose address is one of the process that made the VM, whose memory is not mapped here."""


class RemoteTlbs(Protocol):
    """vCPUs that run in another process, and have leaves there."""

    def drop(self, gfns: Range[Gfn], accesses: tuple[Access, ...]) -> None:
        """These leaves are no more. mmu_lock held; from now on none of them is sent."""
        ...

    async def flush(self) -> None:
        """Returns when no vCPU can reach what was dropped before the call. Source: kvm_flush_remote_tlbs."""
        ...

    def review(self) -> None:
        """Something of the VM has changed that its vCPUs may have to ask about."""
        ...

    def close(self) -> None:
        """The VM is no more."""
        ...

    async def forget(self, inode: Inode) -> None:
        """A view of the inode goes; nothing of it is mapped any more."""
        ...


class Stage2:
    """The guest's address space as KVM maps it. `flush` drops what vCPUs cached of it."""

    def __init__(self, scheduler: Scheduler, tracer: Tracer, vm: int, flush: Callable[[], None]) -> None:
        self.mmu_lock = Lock(scheduler, LockClass.MMU_LOCK, f"mmu_lock vm {vm}")
        self.window: Window[Gfn] = Window(f"mmu_invalidate_seq vm {vm}")
        self.tables: dict[Access, PageTable[Gfn, Leaf]] = {access: PageTable() for access in Access}
        self.check_access: Callable[[Gfn, Pfn, int, bool], bool] | None = None
        """What the hardware checks besides the leaf, at each access through a private one."""
        self.page_bit: PageBit | None = None
        """Of the guest's own tables. Frames are without it: what it says is which of ours an access goes through."""
        self.remote: RemoteTlbs | None = None
        self._flush = flush
        self._tracer = tracer
        self._vm = vm

    def lookup(self, gfn: Gfn, access: Access | None = None) -> Leaf | None:
        """The leaf over `gfn`; of `access` if given, else of either kind. Lockless, like the hardware's walk."""
        if access is not None:
            return self.tables[access].lookup(gfn)
        return self.tables[Access.SHARED].lookup(gfn) or self.tables[Access.PRIVATE].lookup(gfn)

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        """GuestMemory of the engines: the 4K page of `gpa`, if a leaf of the asserted kind allows the access."""
        access = None if private is None else Access.PRIVATE if private else Access.SHARED
        gfn = gfn_of(gpa)
        leaf = self.lookup(gfn, access)
        if leaf is None or (write and not leaf.writable):
            return None
        if self.check_access is not None and self.tables[Access.PRIVATE].lookup(gfn) is leaf:
            pfn = Pfn(leaf.pfn + gfn - leaf.gfn)
            if not self.check_access(gfn, pfn, leaf.order, write):
                return None
        return Translation(leaf.hva + ((gfn - leaf.gfn) << PAGE_SHIFT), leaf.writable, HostWindow(*leaf.window))

    def install(self, leaf: Leaf, access: Access, seen: int) -> bool:
        """Map `leaf` unless the look-up behind it is void; whether it was mapped. mmu_lock held.

        `seen` is the window's sequence from before the look-up. A window over any frame of the leaf makes it void, not
        only one over the frame that faulted (S13). Smaller leaves in its place are replaced.
        """
        assert self.mmu_lock.held_by_me, "install without mmu_lock"
        if self.is_void(leaf, seen):
            return False
        self.tables[access].map(leaf.gfn, leaf.order, leaf)
        if self._tracer.enabled:
            self._tracer.emit(event.KvmMap(self._vm, leaf.gfn, leaf.order, access.value, leaf.pfn))
        return True

    def is_void(self, leaf: Leaf, seen: int) -> bool:
        """Whether `leaf`, from a look-up that noted sequence `seen`, may no longer be installed. mmu_lock held."""
        return self.window.blocks(seen, Range(leaf.gfn, Gfn(leaf.gfn + (1 << leaf.order))))

    def zap(self, gfns: Range[Gfn], accesses: Iterable[Access]) -> None:
        """Remove the leaves of these kinds over `gfns` and what vCPUs here cached of them; those elsewhere have let go
        of them after `flush_remote`. mmu_lock held."""
        assert self.mmu_lock.held_by_me, "zap without mmu_lock"
        accesses = tuple(accesses)
        zapped = 0
        for access in accesses:
            leaves = self.tables[access].zap(gfns)
            zapped += leaves
            if leaves and self._tracer.enabled:
                self._tracer.emit(event.KvmUnmap(self._vm, gfns.start, gfns.end, access.value, leaves))
        if zapped:
            self._flush()
            if self.remote is not None:
                self.remote.drop(gfns, accesses)

    async def flush_remote(self) -> None:
        """Wait until no vCPU of another process can reach what was zapped."""
        if self.remote is not None:
            await self.remote.flush()

    async def memory_appears(self, gfns: Range[Gfn]) -> None:
        """Frames that vCPUs may know as no memory have a slot now. Source: kvm_mmu_invalidate_mmio_sptes."""
        self._flush()
        if self.remote is not None:
            self.remote.drop(gfns, tuple(Access))
            await self.remote.flush()

    async def begin(
        self, ranges: list[Range[Gfn]], accesses: Iterable[Access], around: list[Range[Gfn]] | None = None
    ) -> None:
        """Open a window over the hull of `around`, which has `ranges` in it and is the same unless a leaf could reach
        beyond them; then zap each of `ranges`. Source: kvm_gmem_invalidate_begin."""
        accesses = tuple(accesses)
        closed = around or ranges
        async with self.mmu_lock:
            self.window.begin(Range(min(r.start for r in closed), max(r.end for r in closed)))
            for gfns in ranges:
                self.zap(gfns, accesses)
            await self.flush_remote()

    async def end(self) -> None:
        """Close one window."""
        async with self.mmu_lock:
            self.window.end()
