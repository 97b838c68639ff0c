"""W03: a fault maps a page of a slot with a Userfault bitmap without a look at it."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.vm import Kvm


@mutant("W03", replaces="guestmem.kvm.userfault:check", breaks={"never"})
async def userfault_is_not_looked_at(kvm: Kvm, slot: MemorySlot, gfn: Gfn) -> None:
    """The bit is not asked for."""
