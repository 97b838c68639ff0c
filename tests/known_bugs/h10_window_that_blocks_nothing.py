"""H10: what a sequence is for. A look-up that an invalidation has overtaken is installed all the same.

The retry test of every installer, mmu_invalidate_retry_gfn(), is what S3 rests on.
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Window


@mutant("H10", replaces="guestmem.memory.notifier:Window.blocks", breaks={"S1", "S2", "S3", "S10"})
def window_that_blocks_nothing(self: Window[int], seen: int, numbers: object) -> bool:
    """No look-up is ever void."""
    return False
