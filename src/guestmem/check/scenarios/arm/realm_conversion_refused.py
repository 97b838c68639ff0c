"""Two pages of a realm are converted; somebody may fail to unmap the first, and EL3 to change the GPT."""

from guestmem.check.firmware import Firmware
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, share_or_keep
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType


@scenario(failures=1, sometimes={"vmm: ok", "vmm: convert.bad_page", "guest: ok 0x02"})
def realm_conversion_refused(m: Machine) -> None:
    """Nothing is destroyed before all could unmap (S15)."""
    gmem = launched_gmem(m, 2, VmType.ARM_REALM)
    m.beforehand(m.guest(*(Store(page * PAGE_SIZE, page + 1) for page in range(2))))
    Firmware(m.scheduler, gmem.inode)
    m.actor("vmm", share_or_keep(m, gmem, 0, 2, "RMI_GRANULE_UNDELEGATE"))
    m.actor("guest", m.guest(Load(PAGE_SIZE)))
