"""A user of memory, firmware perhaps, that may fail to unmap a page."""

from guestmem.check.firmware import Firmware
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"convert: ok", "convert: convert.bad_page", "host: ok", "host: SIGBUS"}, failures=1)
def stubborn_user(m: Machine) -> None:
    """A page that stayed mapped does not change hands, and goes to nobody (S19)."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    Firmware(m.scheduler, gmem.inode)
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
    m.actor("host", m.write(view, b"h"))
