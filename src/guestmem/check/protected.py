"""What the scenarios of protected virtual machines share."""

from __future__ import annotations

from guestmem.arch.snp.vmsa import SNP_ACTIVE
from guestmem.check.invariants import Violation
from guestmem.check.machine import Call, Machine
from guestmem.cpu.engine import Pvalidate, Rmpadjust, Vmgexit
from guestmem.cpu.scripted import Load, Step, Store, Write
from guestmem.host import Gmem, Vm
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.protected import ghcb_msr, snp_ap
from guestmem.kvm.protected.ghcb import AP_CREATION
from guestmem.kvm.protected.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vcpu import Vcpu
from guestmem.memory import PAGE_SIZE, Access, PageIndex, read_host
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MP_STATE_HALTED, VmType


def launched(m: Machine, vm_type: VmType | None = None) -> Vm:
    """The first VM, of a protected type, past its launch when the actors begin: with all vCPUs that there are then."""
    vm_type = vm_type or m.protected
    vm = m.vm(vm_type)
    vm.launch.start()
    m.before_start.append(vm.launch.finish)
    return vm


def launched_gmem(
    m: Machine, pages: int = 1, vm_type: VmType | None = None, *, init_shared: bool = False, order: int = 0
) -> Gmem:
    """A file of such a VM, bound as slot 0 at 0."""
    launched(m, vm_type)
    return m.gmem(pages, init_shared=init_shared, order=order)


def used_gmem(m: Machine) -> Gmem:
    """The same, of one page in which the guest has stored a 7."""
    gmem = launched_gmem(m)
    touch(m, 0)
    return gmem


def touch(m: Machine, *pages: int) -> None:
    """The guest has stored 7 into these pages: its tables have them."""
    m.beforehand(m.guest(*(Store(page * PAGE_SIZE, 7) for page in pages)))


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


def ghcb(gpa: int, exit_code: int, info_1: int = 0, info_2: int = 0, rax: int | None = None) -> tuple[Step, ...]:
    """A guest makes a request in its GHCB, a shared page at `gpa`."""
    page, valid = bytearray(PAGE_SIZE), 0
    for place, value in ((0x390, exit_code), (0x398, info_1), (0x3A0, info_2), (0x1F8, rax)):
        if value is not None:
            page[place : place + 8] = value.to_bytes(8, "little")
            valid |= 1 << place // 8
    page[0x3F0:0x400] = valid.to_bytes(16, "little")
    return Write(gpa, bytes(page), private=False), Vmgexit(gpa | ghcb_msr.REG_GPA_REQ), Vmgexit(gpa)


DATA, VMSA, GHCB = 0, PAGE_SIZE, 2 * PAGE_SIZE
"""The three pages of a guest that makes another vCPU: with a 7, its VMSA, and the shared one."""

MAKE_VMSA = (
    Store(DATA, 7),
    Pvalidate(VMSA, large=False, validate=True),
    Rmpadjust(VMSA, large=False, target=1, permissions=0, vmsa=True),
)
AP = 0
CREATE_AP = ghcb(GHCB, AP_CREATION, AP << 32 | snp_ap.CREATE, VMSA, SNP_ACTIVE)
DESTROY_AP = (
    *ghcb(GHCB, AP_CREATION, AP << 32 | snp_ap.DESTROY),
    Rmpadjust(VMSA, large=False, target=1, permissions=0, vmsa=False),
)


def start(vm: Vm) -> Call:
    """SNP_LAUNCH_START and its like."""
    return launch_start(vm.kvm)


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


def ap_memory(m: Machine, before: tuple[Step, ...]) -> tuple[Gmem, Vcpu]:
    """A launched VM's file with those pages, and its vCPU 0, which reads the 7 once the guest makes it run and halts
    until then. Another one has done `before`."""
    gmem = launched_gmem(m, 3)
    gmem.convert(GHCB, PAGE_SIZE, Access.SHARED)
    m.guest(Load(DATA)).close()
    ap = m.vm().kvm.vcpus[AP]
    ap.mp_state = KVM_MP_STATE_HALTED
    prepared = m.guest(*before)
    m.before_start.append(lambda: m.run(prepared))
    return gmem, ap
