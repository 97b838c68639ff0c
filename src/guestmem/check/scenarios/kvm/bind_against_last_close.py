"""A file is bound while its last descriptor is closed."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"bind: ok", "bind: fd.not_open", "close: ok"})
def bind_against_last_close(m: Machine) -> None:
    """The binding holds the file while it is made, and finds it gone afterwards (S6)."""
    gmem = m.gmem(gpa=None)
    m.actor("bind", m.bind(gmem, 1, 0))
    m.actor("close", m.close_fd(gmem.fd))
