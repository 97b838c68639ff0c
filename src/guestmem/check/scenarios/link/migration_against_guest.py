"""The guest of the source stores, and that of the destination, while the identity moves."""

from guestmem.check.link_actors import move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.uapi.kvm import VmType


@scenario(
    sometimes={"source: ok", "source: ioctl.vm_dead", "destination: ok", "destination: fault.identity", "move: ok"}
)
def migration_against_guest(m: Machine) -> None:
    """Before it the one has the memory mapped, after it the other (S7)."""
    gmem = m.gmem(init_shared=False)
    destination = m.create_vm(VmType.SW_PROTECTED)
    destination.set_memory_region(0, 0, gmem.inode.size, gmem=destination.link_guest_memfd(gmem))
    m.actor("source", m.guest(Store(0, 1)))
    m.actor("destination", m.guest(Store(0, 2), vm=destination))
    m.actor("move", move(m, m.vm(), to=destination))
