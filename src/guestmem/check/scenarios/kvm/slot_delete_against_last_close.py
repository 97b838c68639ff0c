"""A memslot goes while the last descriptor of its file is closed."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"close: ok", "delete: ok"})
def slot_delete_against_last_close(m: Machine) -> None:
    """Release and unbind run at once; each leaves the other nothing that is freed (S5, S6)."""
    gmem = m.gmem()
    m.actor("close", m.close_fd(gmem.fd))
    m.actor("delete", m.delete_slot())
