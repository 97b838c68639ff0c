"""A helper has linked and bound the memory; the owner deletes its memslot."""

from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07"})
def lifetime_link_and_delete(m: Machine) -> None:
    """Linked and bound by a helper, slot deleted in the source."""
    gmem = used_gmem(m)
    helper = second_view(m, gmem)
    m.actor("vmm", m.delete_slot())
    m.actor("guest", m.guest(Load(0), vm=helper))
