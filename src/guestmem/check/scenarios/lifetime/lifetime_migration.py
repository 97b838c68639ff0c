"""A VM moves to a struct kvm that has bound the memory; then the source deletes its memslot."""

from guestmem.check.link_actors import move
from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: run.not_launched"})
def lifetime_migration(m: Machine) -> None:
    """Migrated, then slot deleted in the source."""
    gmem = used_gmem(m)
    destination = m.create_vm(m.protected)
    destination.set_memory_region(0, 0, gmem.inode.size, gmem=destination.link_guest_memfd(gmem))
    m.actor("vmm", move(m, m.vm(), to=destination), m.delete_slot())
    m.actor("guest", m.guest(Load(0), vm=destination))
