"""What a software-protected VM is promised: a conversion keeps the bytes."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import Access


@scenario(sometimes={"vmm: ok", "guest: ok 0x07"}, never={"guest: ok 0x00", "guest: ok 0xfa"})
def bytes_survive_conversion(m: Machine) -> None:
    """The guest reads what the host wrote before the page turned private (S12)."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 7
    m.actor("vmm", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED), m.convert(gmem, Access.PRIVATE))
    m.actor("guest", m.guest(Load(0)))
