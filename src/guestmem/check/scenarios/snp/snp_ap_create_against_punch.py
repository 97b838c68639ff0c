"""A guest makes another vCPU run, while the VMM punches out the page that is to be its VMSA."""

from guestmem.check.machine import Machine
from guestmem.check.protected import CREATE_AP, MAKE_VMSA, ap_memory
from guestmem.check.scenario import scenario


@scenario(sometimes={"boss: ok", "ap: ok", "ap: ok 0x07", "ap: failentry", "punch: ok"})
def snp_ap_create_against_punch(m: Machine) -> None:
    """The page that a vCPU enters with is in the file, and the guest's (S3, S9); one that is new is no VMSA."""
    gmem, ap = ap_memory(m, MAKE_VMSA)
    m.actor("boss", m.guest(*CREATE_AP))
    m.actor("ap", m.run_vcpu(ap))
    m.actor("punch", m.punch(gmem, 1))
