"""W02: a page that was brought is mapped with its neighbours, which were not."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory.pages import block


@mutant("W02", replaces="guestmem.kvm.mmu:_leaf_order", breaks={"never"})
def userfault_leaf_covers_others(slot: MemorySlot, gfn: Gfn, limit: int, orders: tuple[int, ...]) -> int:
    """The bitmap of the slot is not looked at."""
    for order in orders:
        congruent = not (slot.gfns.start - slot.pages.start) & ((1 << order) - 1)
        if order <= limit and congruent and slot.gfns.covers(block(gfn, order)):
            return order
    return 0
