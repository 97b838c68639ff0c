"""The VMSA page of a vCPU that a guest made is converted, twice, while the vCPU runs."""

from guestmem.check.machine import Machine
from guestmem.check.protected import CREATE_AP, MAKE_VMSA, ap_memory
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"ap: ok", "ap: ok 0x07", "ap: failentry", "vmm: ok"})
def snp_ap_against_convert(m: Machine) -> None:
    """A vCPU whose page is shared has none and halts; one that is private again is no VMSA any more (S2, S3)."""
    gmem, ap = ap_memory(m, (*MAKE_VMSA, *CREATE_AP))
    m.actor("ap", m.run_vcpu(ap))
    m.actor("vmm", m.convert(gmem, Access.SHARED, 1), m.convert(gmem, Access.PRIVATE, 1))
