"""B39: memory remembers its virtual machine without holding it, so that the number comes back to somebody else."""

from guestmem.check.mutants import mutant
from guestmem.kvm.identity import VirtualMachine


@mutant("B39", replaces="guestmem.kvm.identity:VirtualMachine.put", breaks={"S7", "S8"})
def identity_recycled_early(self: VirtualMachine) -> None:
    """The identity goes with the struct kvm, whoever still names it."""
    self.references.value -= 1
    if self._pool.live.get(self.identity.number) == self.identity:
        self._pool.free(self.identity)
