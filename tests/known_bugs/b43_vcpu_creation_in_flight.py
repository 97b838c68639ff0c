"""B43, ecf371f8b02d: a vCPU is half made while the identity moves, and keeps the one of before."""

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import Kvm


@mutant("B43", replaces="guestmem.kvm.enc_context:_check_no_vcpu_in_flight", breaks={"S18"})
def vcpu_creation_in_flight(kvm: Kvm, source: Kvm) -> None:
    """drop the check `created == online`."""
