"""The passes of one vCPU, and what the end of each means: a stop for the caller, or work of ours and another pass.

`advance` is one such round. What raises an exception in the guest is only noted (`pending`); the next round delivers it
before it executes anything, and repeats the delivery if stage 2 interrupts it.

Unicorn translates a block as a whole, and for that fetches the next page while the instructions before the page
boundary have not run. So a refused fetch beyond the page of RIP is believed only if a single step repeats it.
"""

from __future__ import annotations

from guestmem.cpu import uc_native
from guestmem.cpu.engine import (
    Failed,
    GuestMemory,
    Halt,
    MmioRead,
    PortIn,
    PortOut,
    Shutdown,
    SliceOver,
    Stage2Miss,
    Stop,
)
from guestmem.cpu.exceptions import DB, GP, RFLAGS_TF, UD, Event, Unsupported, deliver
from guestmem.cpu.guest_memory import PAGE, GuestFault, Stage2Refused
from guestmem.cpu.guest_walk import Access
from guestmem.cpu.instructions import Instructions
from guestmem.cpu.mmio import Mmio
from guestmem.cpu.port_io import PortIo, io_permitted
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import HOOK_INTERRUPT, Cause, Core, Refill, Refusal, Signal

_DR6_BS = 1 << 14


class Vcpu:
    """See the module. The parts are open to the engine, which moves registers and values between rounds."""

    def __init__(self, memory: GuestMemory) -> None:
        core = self.core = Core()
        self.tlb = Tlb(core, memory)
        self.ports = PortIo(core, self.tlb)
        self.mmio = Mmio(core, self.tlb)
        self.instructions = Instructions(core, self.tlb)
        self.pending: Event | None = None
        self._stepping = False
        core.hook(HOOK_INTERRUPT, uc_native.InterruptHook(core.guard(self._on_exception)))

    def advance(self) -> Stop | None:
        """One round. None: nothing for the caller yet."""
        if self.pending is not None:
            stop = self._deliver(self.pending)
            if stop is not None:
                return stop
        if self.mmio.active:
            return self._advance_mmio()
        return self._judge(self.core.emulate())

    def _judge(self, code: int, stepped: bool = False) -> Stop | None:
        """What the end of a pass means. `code` is Unicorn's error; `stepped`: the pass was to be of one instruction."""
        core = self.core
        if core.cause is not None:
            return self._after_hook(core.cause)
        if core.refused is not None:
            return self._after_refusal(core.refused, stepped)
        if code == uc_native.ERR_OK:
            return Halt()
        if code == uc_native.ERR_INSN_INVALID:
            return self._after_invalid_instruction()
        return self._failed(uc_native.error_text(code))

    def _failed(self, why: str) -> Failed:
        """The stop for what cannot be executed."""
        return Failed(self.core.sync().env.eip, why)

    def _after_hook(self, cause: Cause) -> Stop | None:
        if isinstance(cause, PortOut | PortIn | MmioRead):
            return cause
        if isinstance(cause, int):
            tail = self.core.sync().tail
            length = self.instructions.int_length(cause) if tail.exception_is_int else 0
            self.pending = Event(cause, tail.error_code & 0xFFFF_FFFF, length)
            return None
        match cause:
            case Signal.SLICE_OVER:
                return SliceOver()
            case Signal.STEPPED:
                return None
            case Signal.UNKNOWN_PORT_SITE:
                return None if self.ports.learn() else self._failed("no port instruction where one was executed")
            case Signal.PORT_NOT_PERMITTED:
                return self._check_port_permission()
            case Signal.MMIO_CROSSED:
                return self._failed("an access of two pages, one of which is MMIO")
            case Signal.SYSCALL | Signal.SYSENTER:
                self.pending = self.instructions.enter_kernel(cause)
                return None

    def _after_refusal(self, refused: Refusal, stepped: bool) -> Stop | None:
        if isinstance(refused, Refill):
            self.tlb.cure(refused)
            return None
        address = self.core.fault_address
        if self.tlb.refused_access is Access.FETCH and not stepped and not self._at_rip(address):
            return self._judge(self._step(), stepped=True)
        if isinstance(refused, GuestFault):
            self.pending = Event(refused.vector, refused.error_code, address=address)
            return None
        return self._missed(refused, address & PAGE - 1 if refused.whole_page else 0)

    def _missed(self, refused: Stage2Refused, offset: int = 0) -> Stop:
        """The stop for a page that stage 2 does not hold; as MMIO it is of no use to the CPU itself."""
        if refused.gpa & -PAGE in self.tlb.mmio:
            return self._failed("a fetch, a page-table walk or a descriptor table in MMIO")
        return Stage2Miss(refused.gpa + offset, refused.write, refused.fetch, refused.private)

    def _at_rip(self, address: int) -> bool:
        """Whether `address` lies in the page of the current instruction."""
        return (address ^ self.instructions.linear_rip()) & -PAGE == 0

    def _after_invalid_instruction(self) -> Stop | None:
        call = self.instructions.hypercall()
        if call is None:
            self.pending = Event(UD)
        else:
            self._trap_if_traced()
        return call

    def _check_port_permission(self) -> Stop | None:
        sregs = self.core.sync().get_sregs()
        port, size = self.ports.asked
        try:
            if io_permitted(sregs, self.tlb.linear_memory(), port, size):
                self.ports.permitted = True
            else:
                self.pending = Event(GP)
        except Stage2Refused as refused:
            return self._missed(refused)
        return None

    def _deliver(self, event: Event) -> Stop | None:
        state = self.core.sync()
        regs, sregs = state.get_regs(), state.get_sregs()
        try:
            entered = deliver(event, regs, sregs, self.tlb.linear_memory())
        except Stage2Refused as refused:
            return self._missed(refused)
        except Unsupported as why:
            return self._failed(str(why))
        if not entered:
            self.core.modify().env.cr[2] = sregs.cr2
            return Shutdown()
        self.pending = None
        self.mmio.forget()
        state = self.core.modify()
        state.set_regs(regs)
        state.set_sregs(sregs)
        # QEMU would take the next fault for a second one inside of this delivery.
        state.tail.old_exception = -1
        return None

    def _step(self) -> int:
        """One pass of one instruction."""
        state = self.core.modify()
        traced, dr6 = state.env.eflags & RFLAGS_TF, state.tail.dr[6]
        state.env.eflags |= RFLAGS_TF
        self._stepping = self.ports.stepping = True
        try:
            code = self.core.emulate()
        finally:
            self._stepping = self.ports.stepping = False
            state = self.core.modify()
            state.env.eflags = state.env.eflags & ~RFLAGS_TF | traced
            state.tail.dr[6] = dr6
        if self.core.cause is Signal.STEPPED:
            self._trap_if_traced()
        return code

    def _trap_if_traced(self) -> None:
        """RFLAGS.TF of the guest: #DB follows the instruction that was just completed."""
        state = self.core.state
        if state.env.eflags & RFLAGS_TF:
            state.tail.dr[6] |= _DR6_BS
            # After OUTS the copy is an older one: the CPU has all of this itself then.
            self.core.dirty |= self.core.fresh
            self.pending = Event(DB)

    def _advance_mmio(self) -> Stop | None:
        """One step of an instruction that uses MMIO."""
        core, mmio = self.core, self.mmio
        hook = mmio.begin()
        try:
            code = self._step()
        finally:
            mmio.end(hook)
        if isinstance(core.cause, PortIn):
            return self._failed("INS to MMIO")
        if core.cause is Signal.STEPPED or isinstance(core.cause, PortOut):
            mmio.forget()
        return mmio.next_write() if core.cause is Signal.STEPPED else self._judge(code, stepped=True)

    def _on_exception(self, _uc: int, vector: int, _data: int) -> None:
        core = self.core
        if vector == DB and isinstance(core.cause, PortOut) and not self._stepping:
            self._trap_if_traced()
        core.stop(Signal.STEPPED if self._stepping and vector == DB else vector)
