"""B53: a conversion does not look again after the zap, and a page that could not be unmapped changes hands."""

from guestmem.check.mutants import mutant
from guestmem.memory import Inode, PageRange


@mutant("B53", replaces="guestmem.memory.convert:check_all_unmapped", breaks={"S15", "S19"})
def bad_page_converted(inode: Inode, pages: PageRange) -> None:
    """No check between the zap and the store."""
