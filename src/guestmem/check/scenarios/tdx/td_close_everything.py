"""Memory of a TD is punched and its file closed, and a call of the module may be busy."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.uapi.kvm import VmType


@scenario(failures=1, sometimes={"guest: ok", "guest: arch.make_private", "punch: ok", "close: ok"})
def td_close_everything(m: Machine) -> None:
    """What the module does not give back never reaches the allocator, nor does its HKID come again (S8, S10, S19)."""
    vm = m.vm(VmType.TDX)
    vm.launch.start()
    call = m.guest(Store(0, 1))
    vm.launch.finish()
    gmem = m.gmem(init_shared=False)
    m.actor("guest", call)
    m.actor("punch", m.punch(gmem))
    m.actor("close", m.close_fd(gmem.fd))
