"""Populate against a conversion of the page that it fills."""

from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.vm import PinnedPage
from guestmem.memory import Access, Page, PageIndex


@scenario(sometimes={"populate: ok", "populate: populate.shared", "convert: ok"})
def populate_against_convert(m: Machine) -> None:
    """Only a private page is prepared and added (S2, S9)."""
    gmem = m.gmem(init_shared=False)

    async def launch(gfn: Gfn, page: Page, source: PinnedPage | None) -> None:
        if gmem.inode.access_at(PageIndex(gfn)) is not Access.PRIVATE:
            raise Violation("S2", f"adds gfn {gfn:#x} to the guest, which is shared")

    m.actor("populate", m.populate_from(None, launch=launch))
    m.actor("convert", m.convert(gmem, Access.SHARED))
