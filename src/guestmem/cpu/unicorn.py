"""UnicornEngine: the default engine, Unicorn (QEMU's TCG) as one virtual CPU.

Unicorn translates and executes; what it leaves to its user, or gets wrong for a machine, is done in the modules beside
this one: translation of addresses (`tlb`, `guest_walk`), code that others rewrite (`code_watch`), exact port exits
(`port_io`), MMIO (`mmio`), exceptions (`exceptions`), CPUID, hypercalls and SYSCALL (`instructions`), hidden segment
state (`x86_env`). `uc_vcpu` puts them together; here are the protocol and the slices.

A slice must end between two instructions, and what Unicorn offers for it does not: a stop from another thread
(`uc_emu_stop`, the `timeout` of `uc_emu_start`) is taken right after a store too, with RIP still at the instruction
that stored, which then happens twice (`add [mem], 1`: in 264 of 300 stops). At the start of a block it is exact. So the
timer's thread adds a block hook, and that hook stops. Adding one while the engine runs is safe (it is the append to a
list), and blocks look at the list if two hooks were there when they were translated (a single one is compiled in);
hence two that do nothing, in native code.

Limits: no interrupts from outside, no virtual-8086 mode, no task gates; TCG checks no segment limits; see also
`code_watch`, `mmio` and `Tlb._holds_descriptors`.
"""

from __future__ import annotations

from guestmem.cpu import cpuid, uc_native
from guestmem.cpu.engine import CpuidTable, GuestMemory, Hypercall, MmioRead, PortIn, SliceOver, Stop
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.slice_timer import shared as slice_timer
from guestmem.cpu.uc_core import HOOK_BLOCK, Signal
from guestmem.cpu.uc_vcpu import Vcpu


class UnicornEngine:
    """One virtual CPU, in the state after reset. Implements `guestmem.cpu.engine.Engine`.

    All methods but `close` raise ValueError once it is closed.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._vcpu = Vcpu(memory)
        self._core = self._vcpu.core
        self._asked: Stop | None = None
        self._apic_base = Sregs().apic_base
        self._closed = False
        self._slice_hook: int | None = None
        self._slice_callback = uc_native.BlockHook(self._core.guard(self._on_slice_over))
        self._core.hook(HOOK_BLOCK, uc_native.NOTHING)
        self._core.hook(HOOK_BLOCK, uc_native.NOTHING, 1, 1)
        self.set_cpuid(cpuid.DEFAULT_CPUID)
        self.set_sregs(Sregs())
        # RDX after reset is the signature of the processor; KVM gives 0x600 before it knows one.
        self.set_regs(Regs(rip=0xFFF0, rdx=0x600))

    def run(self) -> Stop:
        """Execute until a stop. Raises: what GuestMemory raises."""
        self._check_open()
        vcpu = self._vcpu
        if vcpu.mmio.writes:
            return vcpu.mmio.writes.popleft()
        slice_timer.enter(self)
        try:
            if not vcpu.tlb.code.unchanged():
                vcpu.tlb.flush_code()
            stop = vcpu.advance()
            while stop is None:
                stop = SliceOver() if self._slice_hook is not None else vcpu.advance()
        finally:
            slice_timer.leave()
            vcpu.tlb.code.run_ended()
            if self._slice_hook is not None:
                self._remove_slice_hook()
                vcpu.tlb.slice_over()
        self._asked = stop
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
        """The value for the last stop. Dropped if nothing asks any more, because RIP was set meanwhile."""
        self._check_open()
        asked, self._asked = self._asked, None
        if isinstance(asked, PortIn):
            self._vcpu.ports.supply = value
        elif isinstance(asked, MmioRead):
            self._vcpu.mmio.supply(value)
        elif isinstance(asked, Hypercall):
            self._vcpu.instructions.finish_hypercall(value)

    def flush_tlb(self) -> None:
        """Forget every translation of addresses. About 2 us; also right inside of GuestMemory.translate."""
        self._check_open()
        self._vcpu.tlb.flush()

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers. MAXPHYADDR and the place of the C-bit follow from it."""
        self._check_open()
        self._vcpu.instructions.cpuid = dict(table)
        self._vcpu.tlb.set_address_bits(*cpuid.address_bits(table))

    def get_regs(self) -> Regs:
        """The general registers. At a stop that repeats its instruction, those before the instruction."""
        self._check_open()
        return self._core.sync().get_regs()

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers. If RIP moves, what the instruction there waited for is void."""
        self._check_open()
        state = self._core.modify()
        if state.env.eip != regs.rip:
            self._forget_instruction()
        state.set_regs(regs)

    def get_sregs(self) -> Sregs:
        """Segments with their hidden parts, and control registers."""
        self._check_open()
        sregs = self._core.sync().get_sregs()
        sregs.apic_base = self._apic_base
        return sregs

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, hidden parts included, and control registers. Nothing is read from guest memory."""
        self._check_open()
        self._core.modify().set_sregs(sregs)
        uc_native.flush_tlb(self._core.handle)
        self._apic_base = sregs.apic_base

    def close(self) -> None:
        """Give Unicorn's memory back. Idempotent."""
        with slice_timer.lock:
            self._closed = True
            self._core.close()

    def end_slice(self) -> None:
        """For the timer's thread: end the run at the start of the next block."""
        if self._slice_hook is None and not self._closed:
            self._slice_hook = uc_native.hook_add(self._core.handle, HOOK_BLOCK, self._slice_callback)

    def _on_slice_over(self, *_arguments: int) -> None:
        self._core.stop(Signal.SLICE_OVER)

    def _remove_slice_hook(self) -> None:
        with slice_timer.lock:
            hook, self._slice_hook = self._slice_hook, None
            if hook is not None:
                uc_native.hook_del(self._core.handle, hook)

    def _forget_instruction(self) -> None:
        """An answer, a device access or an exception that is not delivered yet."""
        if not isinstance(self._asked, Hypercall):
            self._asked = None
        self._vcpu.ports.supply = None
        self._vcpu.pending = None
        self._vcpu.mmio.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")
