"""All of a pKVM guest's life, of which any call may fail: launch, guest, conversion, hole, close, end, and the next."""

from guestmem.check.machine import Machine
from guestmem.check.protected import life
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(
    failures=1,
    sometimes={"vmm: ok", "vmm: launch.update", "vmm: arch.make_private"},
)
def pkvm_life_against_failures(m: Machine) -> None:
    """A bad page never comes back, nor the number of an identity that hardware still knows (S8, S9, S10, S19, L3)."""
    m.actor("vmm", *life(m, VmType.ARM_PROTECTED))
