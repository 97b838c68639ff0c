"""A launched VM whose vCPUs are scripted, with its last page shared: what tests of guests' calls begin with."""

from __future__ import annotations

from guestmem.check.protected import ghcb
from guestmem.cpu.engine import Tdcall
from guestmem.cpu.registers import Regs
from guestmem.cpu.scripted import ScriptedEngine, Step
from guestmem.host import Gmem
from guestmem.kvm.exits import Exit
from guestmem.kvm.vcpu import Vcpu
from guestmem.memory import PAGE_SIZE, Access
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, VmType
from tests.kvm.conftest import Bench

PAGES = 4
SHARED = (PAGES - 1) * PAGE_SIZE


class Guest:
    """`vcpus` vCPUs, which do what `does` says."""

    def __init__(self, vm_type: VmType, vcpus: int = 1, hypercalls: bool = True) -> None:
        self.bench = Bench(vm_type)
        self.vm = self.bench.vm
        self.vm.launch.start()
        self.gmem: Gmem = self.bench.gmem(PAGES, init_shared=False)
        self.gmem.convert(SHARED, PAGE_SIZE, Access.SHARED)
        self.view = self.gmem.mmap()
        self.vcpus: list[Vcpu] = [self.bench.vcpu(number=number).vcpu for number in range(vcpus)]
        if hypercalls:
            self.vm.enable_hypercalls(KVM_HC_MAP_GPA_RANGE)
        self.vm.launch.finish()

    def engine(self, number: int = 0) -> ScriptedEngine:
        engine = self.vcpus[number].engine
        assert isinstance(engine, ScriptedEngine)
        return engine

    def run(self, number: int = 0) -> Exit:
        return self.bench.run(self.vcpus[number].run())

    def does(self, *script: Step, number: int = 0) -> Exit:
        """The vCPU does these steps next."""
        engine = self.engine(number)
        engine.script, engine.done = list(script), 0
        engine.completed.clear()
        engine.loaded.clear()
        return self.run(number)

    def asks(self, exit_code: int, info_1: int = 0, info_2: int = 0, rax: int | None = None) -> Exit:
        """A request in the GHCB."""
        return self.does(*ghcb(SHARED, exit_code, info_1, info_2, rax))

    def answer(self) -> tuple[int, int]:
        """SW_EXITINFO1 and 2."""
        page = bytes(self.view[SHARED : SHARED + PAGE_SIZE])
        return int.from_bytes(page[0x398:0x3A0], "little"), int.from_bytes(page[0x3A0:0x3A8], "little")

    def rax(self) -> int:
        """RAX in the GHCB."""
        return int.from_bytes(bytes(self.view[SHARED + 0x1F8 : SHARED + 0x200]), "little")

    def tdcall(self, leaf: int, **registers: int) -> Exit:
        self.engine().set_regs(Regs(rax=leaf, **registers))
        return self.does(Tdcall(leaf))
