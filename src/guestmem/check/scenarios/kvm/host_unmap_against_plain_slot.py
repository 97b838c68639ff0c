"""The host unmaps memory that a guest maps through a slot of host addresses."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"guest: ok 0x00", "guest: user.page", "unmap: ok"})
def host_unmap_against_plain_slot(m: Machine) -> None:
    """The MMU notifier takes the guest's frames away before the page goes (S3, S10)."""
    memory = m.anonymous(PAGE_SIZE)
    m.vm().set_memory_region(1, 0, PAGE_SIZE, memory=memory)
    m.actor("guest", m.guest(Load(0)))
    m.actor("unmap", m.unmap(memory))
