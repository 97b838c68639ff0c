"""Two struct kvm of one virtual machine view one inode; a page of it is converted."""

from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import Access


@scenario(sometimes={"first: ok", "second: ok", "convert: ok"})
def two_views_of_one_inode(m: Machine) -> None:
    """Every view is told, not the first one only (S1, S2, S3)."""
    gmem = m.gmem()
    second = second_view(m, gmem)
    m.actor("first", m.guest(Store(0, 1)))
    m.actor("second", m.guest(Store(0, 2), vm=second))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
