"""B40: an identity that can be had by naming something that has it."""

from guestmem.check.mutants import mutant
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.identity import VirtualMachine
from guestmem.kvm.vm import Kvm


@mutant("B40", replaces="guestmem.kvm.link:_check_identity", breaks={"S7"})
def identity_comes_with_a_link(kvm: Kvm, context: KvmGmemContext) -> None:
    """Whoever is handed a guest_memfd may link it, and has the identity of its owner from then on."""
    owner = context.inode.owner
    if isinstance(owner, VirtualMachine) and kvm.machine is not owner:
        owner.get()
        kvm.machine.put()
        kvm.machine = owner
