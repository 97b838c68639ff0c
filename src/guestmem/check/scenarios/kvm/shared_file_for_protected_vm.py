"""A kernel without conversion in place is asked for shared pages on a VM with private memory."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.kvm.gmem import create_guest_memfd
from guestmem.memory import PAGE_SIZE, Access
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import CreateGuestMemfd, UserspaceMemoryRegion2


@scenario(sometimes={"vmm: create.flags"}, never={"vmm: ok"}, level=LEVELS["v7.3"])
def shared_file_for_protected_vm(m: Machine) -> None:
    """The kind is refused: such a page could never become private (S16)."""
    vm = m.vm()

    async def vmm() -> None:
        fd = await create_guest_memfd(vm.kvm, m.process.fds, CreateGuestMemfd(PAGE_SIZE, 3))
        await m.set_region(UserspaceMemoryRegion2(0, KVM_MEM_GUEST_MEMFD, 0, PAGE_SIZE, 0, 0, fd))
        await m.set_attributes_of(vm, Access.PRIVATE)

    m.actor("vmm", vmm())
    m.actor("guest", m.guest(Load(0), Load(0)))
