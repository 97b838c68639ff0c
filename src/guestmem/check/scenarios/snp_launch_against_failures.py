"""A launch of which every firmware call may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import finish, start, update
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(
    failures=1,
    sometimes={
        "vmm: ok",
        "vmm: launch.start",
        "vmm: launch.update",
        "vmm: launch.finish",
    },
)
def snp_launch_against_failures(m: Machine) -> None:
    """Whatever fails, no context stays in firmware and no page with a guest that is not (S8, S10, L3)."""
    vm = m.vm(VmType.SNP)
    m.gmem(init_shared=False)
    m.actor("vmm", start(vm), update(vm), finish(vm))
