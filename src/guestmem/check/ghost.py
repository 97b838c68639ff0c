"""Ghost state: what the checker remembers beside the machine, because the machine itself has no need to.

A page has a life: from one allocation to the next free. The pool gives the most recently freed page out first, so an
entry from an earlier life points to somebody's page and looks right; its life tells. A page's access is what creation
and the conversions since have made it. A page is zeroed once in its life in the file, and is all zero when it is.

The ghosts listen to events, so that they see what was done and not what the data structures say about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from guestmem.check.invariants import Violation
from guestmem.kvm.identity import Identity
from guestmem.memory import PAGE_SIZE, Access, PageIndex, Pfn, Pool, Range, read_host
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.check.machine import Machine

_ZERO = bytes(PAGE_SIZE)


class GhostPool(Pool):
    """A pool that knows which life each of its pages is in."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.life: dict[int, int] = {}

    def allocate(self, pages: int, order: int = 0) -> list[Range[Pfn]]:
        taken = super().allocate(pages, order)
        for run in taken:
            for pfn in range(run.start, run.end):
                self.life[pfn] = self.life.get(pfn, 0) + 1
        return taken


class Ghost:
    """All ghosts of one machine."""

    def __init__(self, machine: Machine, pool: GhostPool) -> None:
        self._machine = machine
        self._pool = pool
        self._zeroed: set[tuple[int, int]] = set()
        self._found: dict[str, tuple[int, int]] = {}  # task -> page number and life that it looked up last
        self.access: dict[int, dict[int, Access]] = {}  # inode -> page -> access, where it is not that of birth
        self.birth: dict[int, Access] = {}
        self.identity: dict[int, Identity] = {}  # struct kvm -> what it was born with, or given since
        machine.tracer.listen(self._see)

    def __fingerprint__(self) -> object:
        """Whether a look-up is of the present life is what counts, not which life that is."""
        fresh = {task: self._pool.life.get(pfn, 0) == life for task, (pfn, life) in sorted(self._found.items())}
        return sorted(self._zeroed), fresh, self.access, self.identity

    def broken(self) -> Iterator[tuple[str, str]]:
        """(property, facts) of what the machine says otherwise."""
        for kvm in self._machine.vms:
            identity = self.identity[kvm.number]
            if kvm.machine.identity != identity:
                yield "S7", f"vm {kvm.number} has {kvm.machine.identity}, which nobody gave it, and not {identity}"
        for inode in self._machine.inodes:
            if inode.destroyed or inode.number not in self.birth:
                continue
            changed = self.access[inode.number]
            for page in range(inode.pages):
                access = changed.get(page, self.birth[inode.number])
                if inode.attributes.get(PageIndex(page)) is not access:
                    yield "S19", f"page {page:#x} of inode {inode.number} is not {access.value}, as it was made"

    def _see(self, seen: event.Event) -> None:
        match seen:
            case event.GmemFault():
                self._found[self._task()] = (seen.pfn, self._pool.life.get(seen.pfn, 0))
            case event.KvmMap():
                self._mapped(seen)
            case event.IommuMap():
                self._mapped_for_device(seen)
            case event.KvmPageFault():
                self._found.pop(self._task(), None)
            case event.GmemFolioZero():
                self._zero(seen)
            case event.GmemFolioFree():
                gone = range(seen.start, seen.end)
                self._zeroed = {key for key in self._zeroed if key[0] != seen.inode or key[1] not in gone}
            case event.GmemCreate():
                self.birth[seen.inode] = Access.SHARED if seen.flags & 2 else Access.PRIVATE
                self.access[seen.inode] = {}
            case event.GmemConvert():
                self._converted(seen)
            case event.KvmMoveEncContext():
                has = self.identity
                has[seen.vm], has[seen.source] = has[seen.source], has[seen.vm]
            case event.KvmCopyEncContext():
                self.identity[seen.vm] = self.identity[seen.source]
            case event.KvmGmemLink() if not self._machine.vms[seen.vm].has_private_memory:
                self.identity[seen.vm] = self.identity[seen.source]

    def _task(self) -> str:
        task = self._machine.scheduler.current
        return task.name if task else ""

    def _mapped(self, seen: event.KvmMap) -> None:
        pfn, life = self._found.get(self._task(), (0, 0))
        if pfn == seen.pfn and life != self._pool.life[pfn]:
            raise Violation(
                "S3", f"vm {seen.vm} maps pfn {pfn} at gfn {seen.gfn:#x}, looked up in an earlier life of it"
            )

    def _mapped_for_device(self, seen: event.IommuMap) -> None:
        first, life = self._found.get(self._task(), (0, 0))
        if seen.pfn <= first < seen.pfn + (1 << seen.order) and life != self._pool.life[first]:
            raise Violation(
                "S3",
                f"domain {seen.domain} maps pfn {first} at {seen.page << 12:#x}, looked up in an earlier life of it",
            )

    def _zero(self, seen: event.GmemFolioZero) -> None:
        folios = self._machine.inodes[seen.inode - 1].folios
        for index in range(seen.start, seen.end):
            if (seen.inode, index) in self._zeroed:
                raise Violation("S12", f"page {index:#x} of inode {seen.inode} is zeroed a second time")
            if read_host(folios.backing.hva(PageIndex(index)), PAGE_SIZE) != _ZERO:
                raise Violation("S12", f"page {index:#x} of inode {seen.inode} has stale bytes after it was zeroed")
            self._zeroed.add((seen.inode, index))

    def _converted(self, seen: event.GmemConvert) -> None:
        inode = self._machine.inodes[seen.inode - 1]
        if inode.unmap_failed.range_cardinality(seen.start, seen.end):
            raise Violation("S19", f"a page of inode {seen.inode} that could not be unmapped changes hands")
        self.access[seen.inode].update(dict.fromkeys(range(seen.start, seen.end), Access(seen.to)))
