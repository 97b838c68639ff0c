"""Stage 2 of the source is filled while the identity moves, by no vCPU."""

from guestmem.check.link_actors import move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"prefault: ok", "prefault: fault.identity", "move: ok"})
def migration_against_prefault(m: Machine) -> None:
    """What was looked up before is not installed afterwards (S7)."""
    gmem = m.gmem(init_shared=False)
    destination = m.create_vm(VmType.SW_PROTECTED)
    destination.link_guest_memfd(gmem)
    m.actor("prefault", m.pre_fault())
    m.actor("move", move(m, m.vm(), to=destination))
