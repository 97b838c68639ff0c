"""A watched host: every S-property is checked after every scheduler step."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from guestmem.check.invariants import ZeroGhost, check_every_step
from guestmem.cpu.engine import GuestMemory
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Host, VcpuHandle, Vm
from guestmem.kvm.exits import Exit
from guestmem.kvm.ioctl import ioctl
from guestmem.memory import PAGE_SIZE
from guestmem.memory.pages import ORDERS
from guestmem.sched import Policy
from guestmem.trace import Refusal, errno_name
from guestmem.trace.events import Event
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import FUTURE, AbiLevel

T = TypeVar("T")
K = PAGE_SIZE


class Bench:
    """A host with a VM of `vm_type`, engines that follow a script, and a record of all events."""

    def __init__(
        self,
        vm_type: VmType = VmType.SW_PROTECTED,
        level: AbiLevel = FUTURE,
        policy: Policy | None = None,
        pages: int = 256,
        hugepages: dict[int, int] | None = None,
        orders: tuple[int, ...] = ORDERS,
    ) -> None:
        kind = type("SmallHost", (Host,), {"orders": orders})
        self.host: Host = kind(
            memory=pages * K, level=level, engine=self._new_engine, policy=policy, debug=True, hugepages=hugepages
        )
        self.events: list[Event] = []
        self.host.tracer.listen(self.events.append)
        ZeroGhost(self.host.tracer)
        check_every_step(self.host)
        self.vm: Vm = self.host.create_vm(vm_type)
        self._script: list[Load | Store] = []

    def run(self, coroutine: Coroutine[Any, None, T], name: str = "test") -> T:
        return self.host.run(coroutine, name)

    def gmem(self, pages: int = 8, *, mmap: bool = True, init_shared: bool = True, gpa: int | None = 0) -> Gmem:
        """A file, bound as slot 0 at `gpa` unless that is None."""
        gmem = self.vm.create_guest_memfd(pages * K, mmap=mmap, init_shared=init_shared)
        if gpa is not None:
            self.vm.set_memory_region(0, gpa, pages * K, gmem=gmem)
        return gmem

    def vcpu(self, *script: Load | Store, number: int = 0, vm: Vm | None = None) -> VcpuHandle:
        """A vCPU that will do the accesses of `script`."""
        self._script = list(script)
        return (vm or self.vm).create_vcpu(number)

    def guest(self, *script: Load | Store) -> tuple[Exit, list[int]]:
        """Run a new vCPU through `script`: its exit, and the bytes that its loads read."""
        vcpu = self.vcpu(*script, number=len(self.vm.kvm.vcpus))
        exit_ = vcpu.run()
        engine = vcpu.engine
        assert isinstance(engine, ScriptedEngine)
        return exit_, engine.loaded

    def close(self) -> None:
        self.host.close()
        statistics = self.host.pool.statistics()
        assert statistics.allocated == statistics.retired, "L3: pages left"
        assert not self.host.identities.live, "L3: identities left"
        assert all(vm.destroyed for vm in self.host.vms), "L3: VMs left"
        assert all(inode.destroyed for inode in self.host.inodes), "L3: inodes left"
        for pool in self.host.hugetlb.statistics().values():
            assert (pool.free, pool.reserved, pool.charged) == (pool.total, 0, 0), "L3: huge pages left"

    def _new_engine(self, memory: GuestMemory) -> ScriptedEngine:
        return ScriptedEngine(memory, self._script)


def ask(host: Host, fd: int, request: int, data: bytes | None) -> tuple[str, bytes]:
    """The ioctl's answer ("0", an fd, or an errno name), and its argument afterwards."""
    scratch = host.anonymous(K)
    if data is not None:
        scratch.write(0, data)
    try:
        answer = str(host.run(ioctl(host.process, fd, request, scratch.hva if data is not None else 0)))
    except Refusal as refusal:
        answer = errno_name(refusal.errno)
    return answer, scratch.read(0, len(data or b""))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()
