"""A hole against a pin of its page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"pin: ok", "punch: ok", "host: ok"})
def punch_against_pin(m: Machine) -> None:
    """The page lives on with its holder; the file gets a new one."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    m.actor("pin", m.pin_briefly(view))
    m.actor("punch", m.punch(gmem))
    m.actor("host", m.write(view, b"h"))
