"""B05: a fault on a poisoned page returns without putting its folio."""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, Page, PageIndex, Registration
from guestmem.memory.fill import fill, zero
from guestmem.trace import EHWPOISON, Refusal


@mutant("B05", replaces="guestmem.memory.guest_memfd:Inode.fault", breaks={"S14", "L1", "L3"})
async def poison_reference_leak(self: Inode, registration: Registration, index: PageIndex, access: Access) -> Page:
    """The put is skipped on the poison branch."""
    self._check_fault(registration.user, index, access)
    if index not in self.folios.present:
        await fill(self, self.folios.huge_page(index))
    reference = self.folios.get(index)
    if index in self.folios.poisoned:
        raise Refusal(EHWPOISON, "fault.poisoned", index=index)
    if index not in self.folios.uptodate:
        await zero(self, index)
    reference.put()
    return Page(reference.pfn, self.mapping_order(index), self.backing.hva(index), self.backing.window(index))
