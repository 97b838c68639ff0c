"""A memslot goes while pre-fault fills it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"prefault: ok", "prefault: prefault.no_slot", "prefault: prefault.slot_deleted", "delete: ok"})
def slot_delete_against_prefault(m: Machine) -> None:
    """Pre-fault answers EAGAIN; waiting for the deletion inside its own read section would be for ever (L4, L5)."""
    m.gmem()
    m.actor("prefault", m.pre_fault())
    m.actor("delete", m.delete_slot())
