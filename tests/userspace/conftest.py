"""A host with one process and one shared file, no KVM in the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.check.invariants import ZeroGhost, check_every_step
from guestmem.cpu.scripted import ScriptedEngine
from guestmem.host import Gmem, Host, Vm
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType
from guestmem.userspace import View


class Machine:
    """A watched host, a software-protected VM, and a file of `pages` pages that were born shared."""

    def __init__(self, pages: int = 8) -> None:
        self.host = Host(memory=256 * PAGE_SIZE, engine=lambda memory: ScriptedEngine(memory, []), debug=True)
        check_every_step(self.host)
        ZeroGhost(self.host.tracer)
        self.vm: Vm = self.host.create_vm(VmType.SW_PROTECTED)
        self.gmem: Gmem = self.vm.create_guest_memfd(pages * PAGE_SIZE, mmap=True, init_shared=True)
        self.view: View = self.gmem.mmap()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.host.close()
    statistics = made.host.pool.statistics()
    assert statistics.allocated == statistics.retired
    assert not made.host.identities.live
