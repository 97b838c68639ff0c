"""Before conversion in place: attributes by guest frame, shared memory from the host address."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE, Access
from guestmem.uapi.levels import LEVELS


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0x00", "attributes: ok"}, level=LEVELS["v7.3"])
def attributes_of_the_vm(m: Machine) -> None:
    """A frame is mapped from the file or from the host, as its attribute says at that moment (S1)."""
    vm = m.vm()
    gmem = vm.create_guest_memfd(PAGE_SIZE)
    memory = m.anonymous(PAGE_SIZE)
    memory[0] = 7
    vm.set_memory_region(0, 0, PAGE_SIZE, gmem=gmem, memory=memory)
    m.actor("guest", m.guest(Load(0)))
    m.actor("attributes", m.set_attributes_of(vm, Access.PRIVATE), m.set_attributes_of(vm, Access.SHARED))
