"""A VM with memory of its own links, and tries to run on, that of another."""

from guestmem.check.link_actors import copy, link, move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType


@scenario(
    sometimes={"stranger: link.identity", "stranger: move.destination", "stranger: copy.destination"},
    never={"stranger: ok"},
)
def stranger_links(m: Machine) -> None:
    """No call gives a virtual machine the identity of another while it has one of its own in use (S7)."""
    gmem = m.gmem(init_shared=False)
    stranger = m.create_vm(VmType.SW_PROTECTED)
    stranger.create_guest_memfd(PAGE_SIZE)
    vm = m.vm()
    m.actor("stranger", link(m, gmem, stranger), move(m, vm, to=stranger), copy(m, vm, to=stranger))
    m.actor("guest", m.guest(Store(0, 1)))
