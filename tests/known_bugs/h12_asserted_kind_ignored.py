"""H12: whether an access is private or shared is taken from the page's state, and not from what the guest asserts.

Right for software-protected VMs, which have nothing to assert with: PFERR_PRIVATE_ACCESS is made up for them. An SNP
guest whose C-bit says otherwise then has the leaf that it does not ask for mapped, for ever.
"""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.vm import Kvm
from guestmem.memory import Access


@mutant("H12", replaces="guestmem.kvm.mmu:_asked_access", breaks={"L5", "S12"})
def asserted_kind_ignored(kvm: Kvm, slot: MemorySlot | None, gfn: Gfn, private: bool | None) -> Access:
    """No access is a mismatch."""
    return kvm.access_of(gfn, slot)
