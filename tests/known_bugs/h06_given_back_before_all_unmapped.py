"""H06: pages are given back to the host before it is known whether all users could unmap, and the conversion refused.

Upstream calls make_shared after the zap without a second look (in-place v8); a failed unmap is recorded by page (Q12).
"""

from guestmem.check.mutants import mutant
from guestmem.memory.notifier import Telling

_begin = Telling.begin


@mutant("H06", replaces="guestmem.memory.notifier:Telling.begin", breaks={"S15"})
async def given_back_before_all_unmapped(self: Telling, through_references: bool = False, last: bool = True) -> None:
    """Nobody is last."""
    await _begin(self, through_references)
