"""A TD is built while a call of the module may be busy, TDH.MR.EXTEND among them."""

from guestmem.arch.tdx import TdxGuest
from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.protected.launch import launch_finish, launch_update
from guestmem.uapi.kvm import VmType

CHUNKS = 16


@scenario(
    failures=1,
    sometimes={"build: ok", "build: launch.update", "build: launch.finish", "build: ioctl.vm_dead"},
)
def td_measurement_fails(m: Machine) -> None:
    """A TD that may run has measured every byte that was added to be (S12)."""
    vm = m.vm(VmType.TDX)
    m.gmem(init_shared=False)
    vm.launch.start()
    vm.create_vcpu()

    async def add() -> None:
        await launch_update(vm.kvm, Gfn(0), None, 1)

    async def finish() -> None:
        await launch_finish(vm.kvm)
        guest = vm.kvm.machine.architecture
        assert isinstance(guest, TdxGuest)
        for gfn, measured in guest.td.extended.items():
            if measured != CHUNKS:
                raise Violation("S12", f"the TD may run with gfn {gfn:#x}, of which {measured} parts are measured")

    m.actor("build", add(), finish())
