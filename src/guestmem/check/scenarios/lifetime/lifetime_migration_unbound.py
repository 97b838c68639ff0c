"""A VM moves whose memory is in no memslot: the source deleted it, the destination binds it then."""

from guestmem.check.link_actors import move
from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0xff"})
def lifetime_migration_unbound(m: Machine) -> None:
    """Slot deleted in the source, migrated, bound again."""
    gmem = used_gmem(m)
    destination = m.create_vm(m.protected)
    view = destination.link_guest_memfd(gmem)
    moved = move(m, m.vm(), to=destination)
    m.actor("vmm", m.delete_slot(), moved, m.bind(view, 0, 0, vm=destination))
    m.actor("guest", m.guest(Load(0), vm=destination))
