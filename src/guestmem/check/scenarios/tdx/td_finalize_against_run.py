"""A TD is finalized while its vCPU is run, and another is made."""

from guestmem.check.link_actors import create_vcpu
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.kvm.protected import launch
from guestmem.uapi.kvm import VmType


@scenario(
    sometimes={
        "finalize: ok",
        "finalize: launch.vcpu_creation",
        "guest: ok 0x00",
        "guest: run.not_launched",
    }
)
def td_finalize_against_run(m: Machine) -> None:
    """Nobody is inside a vCPU, or half done making one, while the TD changes its state (S18)."""
    vm = m.vm(VmType.TDX)
    m.gmem(init_shared=False)
    vm.launch.start()

    async def finish() -> None:
        await launch.launch_finish(vm.kvm)

    m.actor("guest", m.guest(Load(0)))
    m.actor("finalize", finish())
    m.actor("creator", create_vcpu(m, vm, 1))
