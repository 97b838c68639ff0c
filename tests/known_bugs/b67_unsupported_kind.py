"""B67: a file of a kind that the VM cannot use is created anyway."""

from guestmem.check.mutants import mutant
from guestmem.kvm.gmem import supported_flags as _supported
from guestmem.kvm.vm import Kvm
from guestmem.uapi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP


@mutant("B67", replaces="guestmem.kvm.gmem:supported_flags", breaks={"S1", "S16", "never"})
def unsupported_kind(kvm: Kvm) -> int:
    """Every flag is supported by every VM."""
    return _supported(kvm) | GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
