"""What the scenarios of protected virtual machines share."""

from __future__ import annotations

from guestmem.check.machine import Call, Machine
from guestmem.host import Gmem, Vm
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.launch import launch_finish, launch_start, launch_update
from guestmem.uapi.kvm import VmType

POLICY = 1 << 17


def launched(m: Machine, vm_type: VmType = VmType.SNP) -> Vm:
    """The first VM, of a protected type, past its launch when the actors begin: with all vCPUs that there are then."""
    vm = m.vm(vm_type)
    vm.launch.start()
    m.before_start.append(vm.launch.finish)
    return vm


def launched_gmem(m: Machine, pages: int = 1, *, init_shared: bool = False, order: int = 0) -> Gmem:
    """A file of such a VM, bound as slot 0 at 0."""
    launched(m)
    return m.gmem(pages, init_shared=init_shared, order=order)


def start(vm: Vm) -> Call:
    """SNP_LAUNCH_START and its like."""
    return launch_start(vm.kvm, POLICY)


def update(vm: Vm, source: int | None = None, gpa: int = 0, kind: int = 0) -> Call:
    """SNP_LAUNCH_UPDATE of a page."""

    async def add() -> str:
        await launch_update(vm.kvm, Gfn(gpa >> 12), source, 1, kind)
        return "ok"

    return add()


def finish(vm: Vm) -> Call:
    """SNP_LAUNCH_FINISH."""

    async def end() -> str:
        await launch_finish(vm.kvm)
        return "ok"

    return end()
