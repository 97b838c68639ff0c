"""A user of memory leaves while a conversion tells it."""

from guestmem.check.firmware import Firmware
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"leave: ok", "convert: ok", "punch: ok"})
def user_leaves_while_told(m: Machine) -> None:
    """Unregistering waits for the calls that are on their way, and those end (S20, L6)."""
    gmem = m.gmem()
    firmware = Firmware(m.scheduler, gmem.inode)
    m.actor("leave", firmware.leave())
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
    m.actor("punch", m.punch(gmem))
