"""KVM_SET_MEMORY_ATTRIBUTES2 as a client makes it, its argument in memory that may not be readable."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SET_MEMORY_ATTRIBUTES2
from guestmem.uapi.structs import MemoryAttributes2


@scenario(sometimes={"ioctl: ok", "ioctl: user.copy", "ioctl: convert.busy"}, failures=1)
def convert_by_ioctl(m: Machine) -> None:
    """A copy that fails comes before any change, and a busy answer reaches the caller."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    argument = m.anonymous(PAGE_SIZE)
    argument.write(0, MemoryAttributes2(0, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE).pack())
    m.actor("ioctl", ioctl(m.process, gmem.fd, KVM_SET_MEMORY_ATTRIBUTES2, argument.hva))
    m.actor("io", m.pin_briefly(view))
