"""B32: what was looked up without the lock is published without asking whether it is still good.

Upstream in the gfn-to-pfn cache; the same re-test stands before every stage-2 leaf.
"""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.memory import Range, Window


@mutant("B32", replaces="guestmem.memory.notifier:Window.blocks", breaks={"S1", "S2", "S3", "S10", "S12"})
def stale_lookup_published(self: Window[Gfn], seen: int, numbers: Range[Gfn]) -> bool:
    """The sequence is not tested again."""
    return False
