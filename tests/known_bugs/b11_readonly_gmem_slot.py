"""B11: a read-only memslot may have a guest_memfd."""

from guestmem.check.mutants import mutant
from guestmem.kvm.set_region import _check_flags
from guestmem.kvm.vm import Kvm
from guestmem.uapi.kvm import KVM_MEM_READONLY


@mutant("B11", replaces="guestmem.kvm.set_region:_check_flags", breaks={"S16"})
def readonly_gmem_slot(kvm: Kvm, flags: int) -> int:
    """READONLY | GUEST_MEMFD is accepted."""
    return _check_flags(kvm, flags & ~KVM_MEM_READONLY) | flags & KVM_MEM_READONLY
