"""B11: a read-only memslot may have a guest_memfd."""

import errno

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import Kvm
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY


@mutant("B11", replaces="guestmem.kvm.set_region:_check_flags", breaks={"S16"})
def readonly_gmem_slot(kvm: Kvm, flags: int) -> int:
    """READONLY | GUEST_MEMFD is accepted."""
    legal = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD
    if flags & ~legal:
        raise Refusal(errno.EINVAL, "region.flags", flags=flags, legal=legal)
    return flags
