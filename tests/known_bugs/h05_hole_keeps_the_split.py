"""H05: a hole frees a split huge page without merging it first, and its struct pages are never given back."""

from guestmem.check.mutants import mutant
from guestmem.memory import PageRange
from guestmem.memory.splits import Blocks, Splits


@mutant("H05", replaces="guestmem.memory.splits:Splits.forget", breaks={"S14", "S13"})
def hole_keeps_the_split(self: Splits, pages: PageRange) -> list[Blocks]:
    """The huge page goes, the note that it was split stays."""
    return []
