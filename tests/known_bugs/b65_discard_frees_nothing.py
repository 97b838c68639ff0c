"""B65: the call that should give memory back succeeds and frees none."""

from guestmem.check.mutants import mutant
from guestmem.memory import PageRange
from guestmem.userspace.gmem_mapping import GmemSource


@mutant("B65", replaces="guestmem.userspace.gmem_mapping:GmemSource.remove", breaks={"S14", "never"})
async def discard_frees_nothing(self: GmemSource, pages: PageRange) -> None:
    """discard returns 0."""
