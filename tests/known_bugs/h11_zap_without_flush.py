"""H11: leaves are zapped and vCPUs keep what they have cached of them. kvm_flush_remote_tlbs() is the original's."""

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import Kvm


@mutant("H11", replaces="guestmem.kvm.vm:Kvm._flush_tlbs", breaks={"S3"})
def zap_without_flush(self: Kvm) -> None:
    """No TLB is flushed."""
