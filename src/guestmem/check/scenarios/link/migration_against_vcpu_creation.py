"""A VM takes the identity of another while a vCPU of each is made."""

from guestmem.check.link_actors import create_vcpu, move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"move: ok", "move: move.vcpu_creation", "source: ok", "source: ioctl.vm_dead", "destination: ok"})
def migration_against_vcpu_creation(m: Machine) -> None:
    """A vCPU that is half made has the identity of before (S18)."""
    source, destination = m.vm(), m.create_vm(VmType.SW_PROTECTED)
    m.actor("move", move(m, source, to=destination))
    m.actor("source", create_vcpu(m, source))
    m.actor("destination", create_vcpu(m, destination))
