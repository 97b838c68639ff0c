"""A guest asks for a page to be shared, which the VMM does, while another vCPU uses it."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.engine import Vmgexit
from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.exits import HltExit, HypercallExit
from guestmem.kvm.protected import ghcb_msr
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED

SHARE = Vmgexit(ghcb_msr.SHARED << 52 | ghcb_msr.PSC_REQ)


@scenario(failures=1, sometimes={"asks: shared", "asks: refused", "other: ok 0x02", "other: fault.mismatch"})
def snp_page_state_change(m: Machine) -> None:
    """What the VMM answered is what the guest is told, and the page is as it was told (S2, S9)."""
    gmem = launched_gmem(m)
    vm = m.vm()
    vm.enable_hypercalls(KVM_HC_MAP_GPA_RANGE)
    m.guest(SHARE, Store(0, 1, private=False)).close()
    vcpu = vm.kvm.vcpus[0]

    async def asks() -> str:
        exit_ = await vcpu.run()
        while isinstance(exit_, HypercallExit):
            gpa, pages, attributes = exit_.args
            to = Access.PRIVATE if attributes & KVM_MAP_GPA_RANGE_ENCRYPTED else Access.SHARED
            try:
                await m.convert(gmem, to, gpa // PAGE_SIZE, pages)
            except Refusal:
                exit_.ret = 1
            exit_ = await vcpu.run()
        refused = getattr(vcpu.engine, "completed", []) == [ghcb_msr.PSC_RESP_ERROR]
        return "refused" if refused else "shared" if isinstance(exit_, HltExit) else "fault"

    m.actor("asks", asks())
    m.actor("other", m.guest(Store(0, 2, private=True), Load(0, private=True)))
