"""A hole is punched through one view, while another view is closed and its slot deleted."""

from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"punch: ok", "delete: ok", "close: ok"})
def link_punch_against_delete_and_close(m: Machine) -> None:
    """A window that was opened over a binding is closed, though the binding goes with its file (S4)."""
    gmem = m.gmem()
    second_view(m, gmem)
    m.actor("punch", m.punch(gmem))
    m.actor("delete", m.delete_slot())
    m.actor("close", m.close_fd(gmem.fd))
