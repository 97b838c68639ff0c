"""H04: parts are merged into a huge folio although one of them is bad, which hides what is known of it.

"Unsolved in the RFC: memory failure on huge and on split pages" (spec/semantics.md section 10).
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Folios, PageRange


@mutant("H04", replaces="guestmem.memory.folio:Folios.is_held", breaks={"S13", "S14", "S19"})
def merged_though_held(self: Folios, pages: PageRange) -> bool:
    """All private is reason enough to merge."""
    return False
