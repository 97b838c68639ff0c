"""The memory of a guest is closed and its slot deleted, while a vCPU runs whose VMSA is in it."""

from guestmem.check.machine import Machine
from guestmem.check.protected import CREATE_AP, MAKE_VMSA, ap_memory
from guestmem.check.scenario import scenario


@scenario(failures=1, sometimes={"ap: ok", "ap: ok 0x07", "close: ok", "delete: ok"})
def snp_ap_close_everything(m: Machine) -> None:
    """A VMSA is not in use when its page is taken back, so the RMP gives it up (S8, S10, S19)."""
    gmem, ap = ap_memory(m, (*MAKE_VMSA, *CREATE_AP))
    m.actor("ap", m.run_vcpu(ap))
    m.actor("close", m.close_fd(gmem.fd))
    m.actor("delete", m.delete_slot())
