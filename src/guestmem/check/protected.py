"""What the scenarios of protected virtual machines share."""

from __future__ import annotations

from guestmem.check.invariants import Violation
from guestmem.check.machine import Call, Machine
from guestmem.cpu.scripted import Store
from guestmem.host import Gmem, Vm
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.launch import launch_finish, launch_start, launch_update
from guestmem.memory import PAGE_SIZE, Access, PageIndex, read_host
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType

POLICY = 1 << 17


def launched(m: Machine, vm_type: VmType = VmType.SNP) -> Vm:
    """The first VM, of a protected type, past its launch when the actors begin: with all vCPUs that there are then."""
    vm = m.vm(vm_type)
    vm.launch.start()
    m.before_start.append(vm.launch.finish)
    return vm


def launched_gmem(
    m: Machine, pages: int = 1, vm_type: VmType = VmType.SNP, *, init_shared: bool = False, order: int = 0
) -> Gmem:
    """A file of such a VM, bound as slot 0 at 0."""
    launched(m, vm_type)
    return m.gmem(pages, init_shared=init_shared, order=order)


def life(m: Machine, vm_type: VmType) -> tuple[Call, ...]:
    """What happens to a VM and its pages, one call after another, to its end; and another that begins after it, with
    the same number if that came back."""
    vm = m.vm(vm_type)
    gmem = m.gmem(3, init_shared=False)
    guest = m.guest(Store(0, 1), Store(PAGE_SIZE, 2))

    async def next_one() -> str:
        again = m.create_vm(vm_type)
        await start(again)
        return "ok"

    return (
        start(vm),
        update(vm),
        finish(vm),
        guest,
        m.convert(gmem, Access.SHARED),
        m.convert(gmem, Access.PRIVATE),
        m.punch(gmem, 1),
        m.delete_slot(),
        m.bind(gmem, 1, 1 << 20, pages=3),
        m.close_fd(gmem.fd),
        *(m.close_fd(fd) for fd in m.process.fds.open_fds() if fd != gmem.fd),
        next_one(),
    )


def share_or_keep(m: Machine, gmem: Gmem, first: int, pages: int, destroyed_by: str = "") -> Call:
    """The VMM converts pages of which each begins with its number and one; one at most may go bad. Refused, every other
    has that byte (S15), unless the call failed that finds others destroyed already (docs/arch/lifetime.md)."""

    async def convert() -> str:
        try:
            await m.convert(gmem, Access.SHARED, first, pages)
        except Refusal as refusal:
            bad = list(gmem.inode.unmap_failed)
            if len(bad) > 1:
                raise Violation("S15", f"one page was bad, and {bad} are given up") from None
            for page in range(gmem.inode.pages):
                left = read_host(gmem.inode.backing.hva(PageIndex(page)), 1)[0]
                if page not in bad and left != page + 1 and destroyed_by not in m.failed_calls:
                    raise Violation("S15", f"refused, and the first byte of page {page} is {left:#x}") from None
            return refusal.rule
        return "ok"

    return convert()


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
