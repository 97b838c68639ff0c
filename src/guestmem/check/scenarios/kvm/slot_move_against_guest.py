"""A memslot of host memory moves while a guest uses it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"guest: ok 0x00", "guest: ok 0xff", "move: ok"})
def slot_move_against_guest(m: Machine) -> None:
    """The frames of the old place are gone before the new place is seen (S3)."""
    memory = m.anonymous(PAGE_SIZE)
    m.vm().set_memory_region(1, 0, PAGE_SIZE, memory=memory)
    m.actor("guest", m.guest(Load(0)))
    m.actor("move", m.plain_slot(memory, 1, 4 * PAGE_SIZE))
