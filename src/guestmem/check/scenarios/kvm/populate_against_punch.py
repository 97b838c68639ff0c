"""Populate against a hole in the page that it fills."""

from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.vm import PinnedPage
from guestmem.memory import Access, Page, PageIndex


@scenario(sometimes={"populate: ok", "punch: ok"})
def populate_against_punch(m: Machine) -> None:
    """The page that is measured is the one that the file has, at that moment (S12)."""
    gmem = m.gmem(init_shared=False)

    async def launch(gfn: Gfn, page: Page, source: PinnedPage | None) -> None:
        await m.scheduler.preempt("page looked up, not measured yet")
        if gmem.inode.folios.pfn(PageIndex(gfn)) != page.pfn:
            raise Violation("S12", f"measures pfn {page.pfn} for gfn {gfn:#x}, which the file has no more")
        if gmem.inode.access_at(PageIndex(gfn)) is not Access.PRIVATE:
            raise Violation("S2", f"adds gfn {gfn:#x} to the guest, which is shared")

    m.actor("populate", m.populate_from(None, launch=launch))
    m.actor("punch", m.punch(gmem))
