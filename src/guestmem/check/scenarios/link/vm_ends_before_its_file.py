"""The VM descriptor and then the file are closed, another VM comes."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"close: ok", "guest: ok 0xff"})
def vm_ends_before_its_file(m: Machine) -> None:
    """An identity is recycled when its last page is back, and not before (S8)."""
    gmem = m.gmem()
    vm = m.vm()
    gmem.mmap()[0] = 1
    other = m.create_vm(VmType.SW_PROTECTED)
    m.run(m.process.mm.exit())
    m.actor("close", m.close_fd(vm.fd), m.close_fd(gmem.fd))
    m.actor("guest", m.guest(Load(0), vm=other))
