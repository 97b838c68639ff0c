"""B53: a conversion does not look again after the zap, and a page that could not be unmapped changes hands."""

from guestmem.check.mutants import mutant
from guestmem.memory import Inode, PageRange


@mutant("B53", replaces="guestmem.memory.guest_memfd:Inode._check_all_unmapped", breaks={"S15", "S19"})
def bad_page_converted(self: Inode, pages: PageRange) -> None:
    """No check between the zap and the store."""
