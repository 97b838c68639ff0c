"""17d44a96f000, beside B43: a VM migrates although it has helpers, which count on it to keep the identity."""

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import Kvm
from guestmem.trace import Refusal


@mutant("B43", replaces="guestmem.kvm.enc_context:_check_movable", breaks={"S8"})
def migration_with_helpers(kvm: Kvm, source: Kvm) -> None:
    """Every check but that for mirrors."""
    if kvm.vm_type is not source.vm_type or not source.has_private_memory or source.dead or kvm.identity_in_use:
        raise Refusal(22, "move.source")
