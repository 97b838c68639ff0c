"""B30: memslots are swapped between the start and the end of a host invalidation."""

from guestmem.check.mutants import mutant
from guestmem.kvm.memslots import SlotTable
from guestmem.kvm.vm import Kvm


@mutant("B30", replaces="guestmem.kvm.vm:Kvm.swap_memslots", breaks={"S4", "L2"})
async def slots_swapped_in_window(self: Kvm, table: SlotTable) -> None:
    """begin sees the old slots, end the new ones."""
    self.memslots = table
    await self.srcu.synchronize()
