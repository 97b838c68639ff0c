"""The reverse map table (RMP) and the four instructions that change it.

An entry says whose a 4K page is, at which guest address, and what each privilege level (VMPL) of the guest may do
there. A large entry speaks for a whole aligned block. Pages that are in no entry are the hypervisor's.

Source: AMD64 Architecture Programmer's Manual volume 2, 15.36 (tables 15-36, 15-39, 15-40, 15-41); volume 3, RMPUPDATE,
PSMASH, PVALIDATE, RMPADJUST. Numbers of the return codes: arch/x86/include/asm/sev.h, AMD's RFC of the host series,
coconut-svsm kernel/src/sev/utils.rs SevSnpError. Order of the checks of the guest's instructions: microsoft/verismo
source/verismo/src/arch/rmp/access_s.rs. From memory: which of PSMASH's refusals is FAIL_BADADDR, and FAIL_INPUT as
against FAIL_PERMISSION of RMPUPDATE.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import NamedTuple

from guestmem.memory import Pfn

VMPLS = 4
FIRST_OWN = 1 << 40
"""Number of the first page of memory that no guest_memfd has: KVM's own, for VMSAs."""
READ, WRITE, EXECUTE_USER, EXECUTE_SUPERVISOR = 1, 2, 4, 8
ALL = READ | WRITE | EXECUTE_USER | EXECUTE_SUPERVISOR


class Status(enum.IntEnum):
    """What the instructions return in EAX. FAIL_OVERLAP (RMPUPDATE) and FAIL_BADADDR (PSMASH) are both 4 on the
    machine, where no instruction has both."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4
    FAIL_BADADDR = 5
    FAIL_SIZEMISMATCH = 6


class Fault(enum.Enum):
    """What a memory access or a guest's instruction causes in place of being done, in the manual's words."""

    NPF = "#VMEXIT(NPF)"
    NPF_SIZE = "#VMEXIT(NPF) SIZEM"
    NPF_VMPL = "#VMEXIT(NPF) VMPL"
    NOT_VALIDATED = "#VC PAGE_NOT_VALIDATED"
    HOST = "#PF RMP"
    GENERAL_PROTECTION = "#GP(0)"
    INVALID = "VMEXIT_INVALID"


@dataclasses.dataclass(slots=True)
class Entry:
    """An assigned page. `large` entries speak for all of their block; `gfn` is that of the first page."""

    asid: int
    gfn: int
    large: bool
    immutable: bool
    validated: bool = False
    vmsa: bool = False
    in_use: bool = False
    permissions: tuple[int, ...] = (ALL, 0, 0, 0)


class State(NamedTuple):
    """What RMPUPDATE is given. All zero: the hypervisor's page."""

    assigned: bool = False
    asid: int = 0
    gfn: int = 0
    large: bool = False
    immutable: bool = False


class Rmp:
    """`pages` of memory are covered. `large_order` is the order of large entries, 9 on real machines.

    `fails` is asked before an instruction that may find an entry in use by another CPU.
    """

    def __init__(self, pages: int, large_order: int = 9, fails: Callable[[str], bool] = lambda _: False) -> None:
        self.large_order = large_order
        self._pages = pages
        self._fails = fails
        self._entries: dict[Pfn, Entry] = {}

    def entries(self) -> Iterator[tuple[Pfn, Entry]]:
        """Every page that has an owner, by first page of its entry."""
        return iter(sorted(self._entries.items()))

    def lookup(self, pfn: Pfn) -> tuple[Pfn, Entry] | None:
        """The entry that speaks for a page, and its first page; None for the hypervisor's."""
        entry = self._entries.get(pfn)
        if entry is not None:
            return pfn, entry
        base = self._base(pfn)
        entry = self._entries.get(base)
        return (base, entry) if entry is not None and entry.large else None

    def gfn_of(self, pfn: Pfn) -> int | None:
        found = self.lookup(pfn)
        return None if found is None else found[1].gfn + pfn - found[0]

    # The hypervisor's instructions

    def rmpupdate(self, pfn: Pfn, new: State) -> Status:
        """Give a page to a guest or to firmware (asid 0, immutable), or take it back. Clears `validated`; VMPL0 may do
        everything and the others nothing. Source: APM volume 3, RMPUPDATE; 15.36.3."""
        if not (0 <= pfn < self._pages or pfn >= FIRST_OWN) or (new.large and pfn != self._base(pfn)):
            return Status.FAIL_INPUT
        if not new.assigned and (new.asid or new.gfn or new.immutable):
            return Status.FAIL_INPUT
        if new.large and new.gfn & ((1 << self.large_order) - 1):
            return Status.FAIL_INPUT
        old = self._entries.get(pfn)
        if (old is not None and old.in_use) or self._fails("snp: RMPUPDATE"):
            return Status.FAIL_INUSE
        if old is not None and old.immutable:
            return Status.FAIL_PERMISSION
        if self._overlaps(pfn, new.large):
            return Status.FAIL_OVERLAP
        if new.assigned:
            self._entries[pfn] = Entry(new.asid, new.gfn, new.large, new.immutable)
        else:
            self._entries.pop(pfn, None)
        return Status.SUCCESS

    def psmash(self, pfn: Pfn) -> Status:
        """A large entry becomes small ones that are equal but for their addresses. Source: APM volume 3, PSMASH."""
        if not 0 <= pfn < self._pages:
            return Status.FAIL_BADADDR
        if pfn != self._base(pfn):
            return Status.FAIL_INPUT
        entry = self._entries.get(pfn)
        if entry is None or not entry.large:
            return Status.FAIL_INPUT
        if entry.in_use or self._fails("snp: PSMASH"):
            return Status.FAIL_INUSE
        if entry.immutable:
            return Status.FAIL_PERMISSION
        for number in range(1 << self.large_order):
            small = dataclasses.replace(entry, large=False, gfn=entry.gfn + number)
            self._entries[Pfn(pfn + number)] = small
        return Status.SUCCESS

    # The guest's instructions: `pfn` is what the nested page table has for the address, in a leaf of `leaf_large`

    def pvalidate(
        self, asid: int, gfn: int, pfn: Pfn, *, large: bool, validate: bool, vmpl: int = 0
    ) -> tuple[Status, bool] | Fault:
        """Status, and whether the entry was so already (the carry flag). Source: APM volume 3, PVALIDATE; 15.36.6."""
        if vmpl:
            return Fault.GENERAL_PROTECTION
        if large and gfn & ((1 << self.large_order) - 1):
            return Status.FAIL_INPUT, False
        entry = self._for_instruction(asid, gfn, pfn, large)
        if isinstance(entry, (Fault, Status)):
            return entry if isinstance(entry, Fault) else (entry, False)
        unchanged = entry.validated is validate
        entry.validated = validate
        return Status.SUCCESS, unchanged

    def rmpadjust(
        self,
        asid: int,
        gfn: int,
        pfn: Pfn,
        *,
        large: bool,
        vmpl: int = 0,
        target: int,
        permissions: int,
        vmsa: bool = False,
    ) -> Status | Fault:
        """Set what a less privileged level may do, and whether the page is a VMSA, which VMPL0 alone may say.
        Source: APM volume 3, RMPADJUST; 15.36.7."""
        if target >= VMPLS or permissions & ~ALL or (large and gfn & ((1 << self.large_order) - 1)):
            return Status.FAIL_INPUT
        if target <= vmpl or (vmsa and vmpl):
            return Status.FAIL_PERMISSION
        entry = self._for_instruction(asid, gfn, pfn, large)
        if isinstance(entry, Fault):
            return entry
        found = self.lookup(pfn)
        assert found is not None
        if not found[1].validated:
            return Fault.NOT_VALIDATED
        if isinstance(entry, Status):
            return entry
        if entry.in_use:
            return Status.FAIL_INUSE
        if permissions & ~entry.permissions[vmpl]:
            return Status.FAIL_PERMISSION
        entry.permissions = (*entry.permissions[:target], permissions, *entry.permissions[target + 1 :])
        if not vmpl:
            entry.vmsa = vmsa
        return Status.SUCCESS

    # Accesses: table 15-39

    def check_host_write(self, pfn: Pfn, large: bool = False) -> Fault | None:
        """A write, or a page-table update, by the host through a leaf that may be large: every page must be its own."""
        pages = range(1 << self.large_order) if large else range(1)
        taken = any(self.lookup(Pfn(pfn + number)) is not None for number in pages)
        return Fault.HOST if taken else None

    def check_guest(
        self, asid: int, gfn: int, pfn: Pfn, *, leaf_large: bool, need: int, vmpl: int = 0, encrypted: bool = True
    ) -> Fault | None:
        """An access by an SNP guest, which `need`s these permissions. `encrypted` is the C-bit."""
        found = self.lookup(pfn)
        if not encrypted:
            return Fault.NPF if found is not None and need & WRITE else None
        if found is None:
            return Fault.NPF
        base, entry = found
        if entry.asid != asid or entry.gfn + pfn - base != gfn or entry.immutable or entry.large is not leaf_large:
            return Fault.NPF
        if not entry.validated:
            return Fault.NOT_VALIDATED
        if need & ~entry.permissions[vmpl] or (need & WRITE and entry.in_use):
            return Fault.NPF_VMPL
        return None

    def vmrun(self, asid: int, gfn: int, pfn: Pfn) -> Fault | None:
        """VMRUN with a VMSA page, which is in use until `vmexit`. Source: table 15-41."""
        entry = self._entries.get(pfn)
        if entry is None or entry.in_use or not self.is_vmsa(asid, gfn, pfn):
            return Fault.INVALID
        entry.in_use = True
        return None

    def is_vmsa(self, asid: int, gfn: int, pfn: Pfn) -> bool:
        """Whether VMRUN takes the page for a VMSA of this guest."""
        entry = self._entries.get(pfn)
        if entry is None or not entry.vmsa or entry.large:
            return False
        return entry.asid == asid and entry.gfn == gfn and not entry.immutable

    def vmexit(self, pfn: Pfn) -> None:
        """#VMEXIT: the VMSA is out of use."""
        self._entries[pfn].in_use = False

    # For firmware

    def reclaim(self, pfn: Pfn) -> bool:
        """SNP_PAGE_RECLAIM: firmware gives up its hold of an immutable page. Whether there was one."""
        found = self._entries.get(pfn)
        if found is None or not found.immutable:
            return False
        found.immutable = False
        return True

    def _for_instruction(self, asid: int, gfn: int, pfn: Pfn, large: bool) -> Entry | Fault | Status:
        found = self.lookup(pfn)
        if found is None:
            return Fault.NPF
        base, entry = found
        if entry.asid != asid or entry.gfn + pfn - base != gfn or entry.immutable:
            return Fault.NPF
        if large and not entry.large:
            return Status.FAIL_SIZEMISMATCH
        if entry.large and not large:
            return Fault.NPF_SIZE
        return entry

    def _overlaps(self, pfn: Pfn, large: bool) -> bool:
        base = self._base(pfn)
        if not large:
            entry = self._entries.get(base)
            return entry is not None and entry.large and pfn != base
        return any(Pfn(base + number) in self._entries for number in range(1, 1 << self.large_order))

    def _base(self, pfn: Pfn) -> Pfn:
        return Pfn(pfn >> self.large_order << self.large_order)
