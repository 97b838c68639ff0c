"""A launch of which every firmware call may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import finish, start, update
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.uapi.kvm import VmType


@scenario(
    failures=2,
    sometimes={
        "vmm: ok",
        "vmm: launch.start",
        "vmm: launch.update",
        "vmm: launch.finish",
        "vmm: arch.guest_access",
    },
)
def snp_launch_against_failures(m: Machine) -> None:
    """No context stays in firmware, no page with a guest that is not; what firmware keeps serves nobody (S8, L3)."""
    vm = m.vm(VmType.SNP)
    m.gmem(init_shared=False)
    guest = m.guest(Store(0, 1))
    m.actor("vmm", start(vm), update(vm), finish(vm), guest)
