"""A guest ends one of its vCPUs and takes its VMSA page back, while that vCPU is about to enter."""

from guestmem.check.machine import Machine
from guestmem.check.protected import CREATE_AP, DESTROY_AP, MAKE_VMSA, ap_memory
from guestmem.check.scenario import scenario


@scenario(sometimes={"boss: ok", "ap: ok", "ap: ok 0x07"})
def snp_ap_destroy_against_vmrun(m: Machine) -> None:
    """Who asked for the end goes on when the vCPU is out, so VMRUN never meets a page that is no VMSA any more (S3)."""
    _, ap = ap_memory(m, (*MAKE_VMSA, *CREATE_AP))
    m.actor("boss", m.guest(*DESTROY_AP))
    m.actor("ap", m.run_vcpu(ap))
