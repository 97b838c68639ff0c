"""A TD's page is converted while the guest uses it, and a call of the module may be busy."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType


@scenario(failures=1, sometimes={"vmm: ok", "vmm: convert.bad_page", "guest: ok 0x07"})
def td_convert_against_guest(m: Machine) -> None:
    """A page that the module does not give back is nobody's any more (S2, S9, S19)."""
    vm = m.vm(VmType.TDX)
    gmem = m.gmem(init_shared=False)
    vm.launch.start()
    call = m.guest(Store(0, 7), Load(0))
    vm.launch.finish()
    m.actor("vmm", m.convert(gmem, Access.SHARED), m.convert(gmem, Access.PRIVATE))
    m.actor("guest", call)
