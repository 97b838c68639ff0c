"""The VMM asks for the dirty log while a guest reads a page and then writes it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES


@scenario(sometimes={"guest: dirty 0x1", "log: dirty 0x0", "log: dirty 0x1"}, never={"guest: dirty 0x0"})
def dirty_log_against_guest(m: Machine) -> None:
    """A write that is over is in the log that is asked for next, or was in one before."""
    memory = m.anonymous(PAGE_SIZE)
    m.vm().set_memory_region(0, 0, PAGE_SIZE, memory=memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
    m.actor("guest", m.guest(Load(0), Store(0, 9)), m.dirty_log())
    m.actor("log", m.dirty_log())
