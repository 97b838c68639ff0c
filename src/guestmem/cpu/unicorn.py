"""UnicornEngine: the default engine, Unicorn (QEMU's TCG) as one virtual CPU.

Unicorn translates and executes; what it leaves to its user, or gets wrong for a machine, is done in the modules beside
this one: translation of addresses (`tlb`, `guest_walk`), code that others rewrite (`code_watch`), exact port exits
(`port_io`), MMIO (`mmio`), exceptions (`exceptions`), CPUID, MSRs and SYSCALL (`instructions`), hypercalls and what
protected guests have (`guest_calls`), exact stops (`uc_core`), hidden segment state (`cpu_state`, `x86_env`). `uc_vcpu`
puts them together; here are the protocol and the slices.

Limits: no virtual-8086 mode, no task gates; TCG checks no segment limits; see also `code_watch`, `mmio` and
`Tlb._holds_descriptors`.
"""

from __future__ import annotations

from guestmem.cpu import cpuid, uc_native
from guestmem.cpu.engine import (
    CpuidTable,
    GuestMemory,
    Hypercall,
    MmioRead,
    PortIn,
    Pvalidate,
    ReadMsr,
    Rmpadjust,
    SliceOver,
    Stop,
    Tdcall,
    Vmgexit,
    WriteMsr,
)
from guestmem.cpu.exceptions import Event
from guestmem.cpu.guest_calls import PAST_INSTRUCTION
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.slice_timer import shared as slice_timer
from guestmem.cpu.uc_state import UnicornState
from guestmem.cpu.uc_vcpu import Vcpu


class UnicornEngine(UnicornState):
    """One virtual CPU, in the state after reset. Implements `guestmem.cpu.engine.Engine` and `CpuState`.

    All methods but `close` raise ValueError once it is closed.
    """

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(Vcpu(memory))
        self._asked: Stop | None = None
        self._next: Stop | None = None
        self.set_cpuid(cpuid.default(memory.page_bit))
        self.set_sregs(Sregs())
        # RDX after reset is the signature of the processor; KVM gives 0x600 before it knows one.
        self.set_regs(Regs(rip=0xFFF0, rdx=0x600))

    def run(self) -> Stop:
        """Execute until a stop. Raises: what GuestMemory raises."""
        self._check_open()
        stop, self._next = self._next or self._vcpu.mmio.next_write(), None
        if stop is None:
            stop = self._run_slice()
        self._asked = stop
        return stop

    def _run_slice(self) -> Stop:
        vcpu, core, code = self._vcpu, self._core, self._vcpu.tlb.code
        core.begin_slice()
        slice_timer.enter(core)
        try:
            if not code.unchanged():
                vcpu.tlb.flush_code()
            stop = vcpu.advance()
            while stop is None:
                stop = SliceOver() if core.slice_over else vcpu.advance()
        finally:
            slice_timer.leave()
            code.run_ended()
            if core.slice_over:
                vcpu.tlb.slice_over()
        return stop

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """Execute the instruction that missed stage 2 at `gpa`. What it does there is seen, `write` is not needed."""
        self._check_open()
        self._vcpu.mmio.add_page(gpa)
        stop = self.run()
        while isinstance(stop, SliceOver) and self._vcpu.mmio.active:
            stop = self.run()
        return stop

    def complete(self, value: int) -> None:
        """The value for the last stop, with which its instruction is finished at once.

        Dropped if nothing asks any more, because RIP was set meanwhile. Raises: what GuestMemory raises.
        """
        self._check_open()
        asked, self._asked = self._asked, None
        if isinstance(asked, PortIn):
            self._next = self._vcpu.answer_port(asked, value)
        elif isinstance(asked, MmioRead):
            self._vcpu.mmio.supply(value)
            while self._vcpu.mmio.active and self._next is None:
                self._next = self._vcpu.advance()
        elif isinstance(asked, ReadMsr | WriteMsr):
            self._vcpu.finish_msr(asked, value)
        elif isinstance(asked, (Hypercall, Pvalidate, Rmpadjust, Vmgexit, Tdcall)):
            self._vcpu.finish_call(asked, value)

    def raise_exception(self, vector: int, error_code: int) -> None:
        """Delivered at the next run, at the instruction of the last stop."""
        self._check_open()
        asked, self._asked = self._asked, None
        self._vcpu.raise_exception(asked, Event(vector, error_code))

    def flush_tlb(self) -> None:
        """Forget every translation of addresses. About 2 us; also right inside of GuestMemory.translate."""
        self._check_open()
        self._vcpu.tlb.flush()

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers. MAXPHYADDR follows from it; the page bit does not, which is the hardware's."""
        self._check_open()
        self._vcpu.instructions.msrs.cpuid = dict(table)
        self._vcpu.tlb.set_physical_bits(cpuid.physical_bits(table))

    def set_stop_msrs(self, ranges: tuple[range, ...], unknown: bool = False) -> None:
        self._check_open()
        self._vcpu.instructions.stop_msrs = ranges
        self._vcpu.instructions.stop_unknown_msrs = unknown

    def get_regs(self) -> Regs:
        """The general registers. At a stop that repeats its instruction, those before the instruction."""
        self._check_open()
        return self._core.cpu.get_regs()

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers. If RIP moves, what the instruction there waited for is void."""
        self._check_open()
        if self._core.cpu.env.eip != regs.rip:
            self._forget_instruction()
        self._core.cpu.set_regs(regs)

    def get_sregs(self) -> Sregs:
        """Segments with their hidden parts, and control registers."""
        self._check_open()
        sregs = self._core.cpu.get_sregs()
        sregs.apic_base = self._vcpu.instructions.msrs.apic_base
        return sregs

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, hidden parts included, and control registers. Nothing is read from guest memory."""
        self._check_open()
        self._core.cpu.set_sregs(sregs)
        uc_native.flush_tlb(self._core.handle)
        self._vcpu.instructions.msrs.apic_base = sregs.apic_base

    def close(self) -> None:
        """Give Unicorn's memory back. Idempotent."""
        with slice_timer.lock:
            self._closed = True
            self._core.close()

    def _forget_instruction(self) -> None:
        """An answer, a device access or an exception that is not delivered yet."""
        if not isinstance(self._asked, PAST_INSTRUCTION):
            self._asked = None
        self._next = None
        if self._vcpu.pending is not None and not self._vcpu.pending.external:
            self._vcpu.pending = None
        self._vcpu.mmio.forget()
