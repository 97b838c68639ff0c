"""The owner of a TD's memory deletes its memslot and makes a hole, while a helper that has it bound uses it."""

from guestmem.check.link_actors import second_view
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"helper: ok 0x07", "helper: ok 0x00", "vmm: ok"})
def td_slot_delete_with_helper(m: Machine) -> None:
    """Both have one S-EPT: a leaf goes when nobody shows its page, or when all have been told (S3, S9)."""
    gmem = launched_gmem(m, vm_type=VmType.TDX)
    helper = second_view(m, gmem)
    m.beforehand(m.guest(Store(0, 7)))
    m.actor("vmm", m.delete_slot(), m.punch(gmem))
    m.actor("helper", m.guest(Load(0), vm=helper))
