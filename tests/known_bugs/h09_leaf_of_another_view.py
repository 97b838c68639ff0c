"""H09: deleting a memslot takes pages out of the TD that another view of the same virtual machine still shows.

Found by the comparison of lifetimes (lifetime_link_and_delete on TDX); no kernel has helpers of TDs yet (R24).
"""

from collections.abc import Iterable

from guestmem.check.mutants import mutant
from guestmem.kvm import protection
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot


@mutant("H09", replaces="guestmem.kvm.protection:unmapped", breaks={"S3"})
def leaf_of_another_view(context: KvmGmemContext, slots: Iterable[MemorySlot]) -> None:
    """Nobody else is asked."""
    if context.kvm.machine.architecture.has_tables and context.is_owners:
        protection._invalidate(context, [slot.gfns for slot in slots])
