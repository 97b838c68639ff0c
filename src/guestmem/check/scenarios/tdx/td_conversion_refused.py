"""Two pages of a TD are converted; somebody may fail to unmap the first, and each call of the module may be busy."""

from guestmem.check.firmware import Firmware
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, share_or_keep
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType


@scenario(failures=2, sometimes={"vmm: ok", "vmm: convert.bad_page", "guest: ok 0x02"})
def td_conversion_refused(m: Machine) -> None:
    """Nothing is removed, and so zeroed, before all could unmap and all is blocked and tracked (S15)."""
    gmem = launched_gmem(m, 2, VmType.TDX)
    m.beforehand(m.guest(*(Store(page * PAGE_SIZE, page + 1) for page in range(2))))
    Firmware(m.scheduler, gmem.inode)
    m.actor("vmm", share_or_keep(m, gmem, 0, 2, "TDH.MEM.PAGE.REMOVE"))
    m.actor("guest", m.guest(Load(PAGE_SIZE)))
