"""The end of a launch against a vCPU that is run, and one that is made."""

from guestmem.check.machine import Machine
from guestmem.check.protected import finish
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.kvm.vcpu import create_vcpu
from guestmem.uapi.kvm import VmType


@scenario(
    sometimes={
        "vcpu: ok",
        "vcpu: run.not_launched",
        "finish: ok",
        "finish: launch.vcpu_creation",
        "maker: ok",
    }
)
def snp_launch_finish_against_vcpu(m: Machine) -> None:
    """A vCPU's state is read while nobody has it loaded, and no vCPU is half made (S18)."""
    vm = m.vm(VmType.SNP)
    vm.launch.start()
    m.gmem(init_shared=False)
    m.actor("vcpu", m.guest(Store(0, 1)))
    m.actor("finish", finish(vm))

    async def make() -> None:
        vcpu = await create_vcpu(vm.kvm, 7)
        await vcpu.put()

    m.actor("maker", make())
