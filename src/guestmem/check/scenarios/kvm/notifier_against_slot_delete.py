"""A hole under a slot of host addresses, while that slot goes."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"punch: ok", "delete: ok"})
def notifier_against_slot_delete(m: Machine) -> None:
    """The notifier's end sees the slots that its start saw, so windows pair up (S4)."""
    gmem = m.gmem(gpa=None)
    view = gmem.mmap()
    m.vm().set_memory_region(1, 0, PAGE_SIZE, memory=view)
    m.actor("punch", m.punch(gmem))
    m.actor("delete", m.delete_slot(1))
