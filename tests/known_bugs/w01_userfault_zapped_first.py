"""W01: a slot that is given a Userfault bitmap is unmapped while faults that saw it without one still go on."""

from guestmem.check.mutants import mutant
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.vm import Kvm
from guestmem.memory.notifier import BOTH


@mutant("W01", replaces="guestmem.kvm.userfault:change", breaks={"never"})
async def userfault_zapped_first(kvm: Kvm, slot: MemorySlot, flags: int, bitmap: int | None) -> None:
    """Unmapped, then told, and nobody is waited for."""
    async with kvm.stage2.mmu_lock:
        kvm.stage2.zap(slot.gfns, BOTH)
    slot.flags, slot.userfault_bitmap = flags, bitmap
