"""Two VMs and a helper link, bind, migrate and close one memory."""

from guestmem.check.link_actors import copy, link, move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.uapi.kvm import VmType


@scenario(
    sometimes={
        "destination: ok",
        "destination: link.not_open",
        "destination: move.mirrors",
        "destination: enc_context.busy",
        "destination: fd.not_open",
        "helper: ok",
        "helper: copy.source",
        "destination: fault.identity",
    }
)
def three_actors_share_an_identity(m: Machine) -> None:
    """Whoever comes first: memory is mapped by its own virtual machine alone, and goes with the last view (S7, S8)."""
    gmem = m.gmem(init_shared=False, mmap=False, gpa=None)
    source, destination, helper = m.vm(), m.create_vm(VmType.SW_PROTECTED), m.create_vm(VmType.SW_PROTECTED)
    guest = m.guest(Store(0, 1), vm=destination)
    m.actor("source", m.close_fd(gmem.fd), m.close_fd(source.fd))
    m.actor("destination", link(m, gmem, destination, slot=0), move(m, source, to=destination), guest)
    m.actor("helper", copy(m, source, to=helper), link(m, gmem, helper, slot=0), m.close_fd(helper.fd))
