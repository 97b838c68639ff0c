"""A VM that gets a helper migrates, and its source and destination are closed."""

from guestmem.check.link_actors import copy, move
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.uapi.kvm import VmType


@scenario(sometimes={"move: ok", "move: move.mirrors", "move: enc_context.busy", "helper: ok", "helper: copy.source"})
def migration_against_helper(m: Machine) -> None:
    """The identity does not go where the helper's owner does not go (S8)."""
    source, destination, helper = m.vm(), m.create_vm(VmType.SW_PROTECTED), m.create_vm(VmType.SW_PROTECTED)
    m.actor("move", move(m, source, to=destination), m.close_fd(destination.fd))
    m.actor("helper", copy(m, source, to=helper), m.scheduler.preempt("at work"), m.close_fd(helper.fd))
    m.actor("close", m.close_fd(source.fd))
