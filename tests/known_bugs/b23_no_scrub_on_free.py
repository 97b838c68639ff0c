"""B23, the other half: the hook for "page becomes shared" runs when a page is freed, and leaves its bytes."""

from guestmem.check.arena import ArenaBacking
from guestmem.check.mutants import mutant
from guestmem.memory import PageRange


@mutant("B23", replaces="guestmem.check.arena:ArenaBacking.free", breaks={"S10", "S12", "never"})
def no_scrub_on_free(self: ArenaBacking, pages: PageRange) -> None:
    """The next owner of the page finds what the last one wrote."""
