"""The passes of one vCPU, and what the end of each means: a stop for the caller, or work of ours and another pass.

`advance` is one such round. What raises an exception in the guest is only noted (`pending`); the next round delivers it
before it executes anything, and repeats the delivery if stage 2 interrupts it.

Unicorn translates a block as a whole, and for that fetches the next page while the instructions before the page
boundary have not run. So a refused fetch beyond the page of RIP is believed only if a single step repeats it.
"""

from __future__ import annotations

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import (
    DR_WRITES,
    EXIT_INIT,
    EXIT_MSR,
    EXIT_WRITE_DR5,
    EXIT_WRITE_DR7,
    HF_IOBPT,
    REQUEST_INIT,
    VMEXIT,
)
from guestmem.cpu.engine import (
    Failed,
    GuestMemory,
    Halt,
    InterruptWindow,
    MmioRead,
    PortIn,
    PortOut,
    ReadMsr,
    Shutdown,
    SliceOver,
    Stage2Miss,
    Stop,
    WriteMsr,
)
from guestmem.cpu.exceptions import DB, RFLAGS_TF, UD, Event, Unsupported, deliver
from guestmem.cpu.guest_calls import PAST_INSTRUCTION, GuestCall, GuestCalls
from guestmem.cpu.guest_memory import PAGE, GuestFault, Stage2Refused
from guestmem.cpu.guest_walk import Access
from guestmem.cpu.instructions import Instructions
from guestmem.cpu.interrupts import Interrupts
from guestmem.cpu.mmio import Mmio
from guestmem.cpu.port_io import PortIo
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import Cause, CodeChanged, Core, Refusal, Signal

_DR6_BS = 1 << 14


class Vcpu:
    """See the module. The parts are open to the engine, which moves registers and values between rounds."""

    def __init__(self, memory: GuestMemory) -> None:
        core = self.core = Core()
        self.tlb = Tlb(core, memory)
        self.ports = PortIo(core, self.tlb)
        self.mmio = Mmio(core, self.tlb)
        self.instructions = Instructions(core, self.tlb)
        self.calls = GuestCalls(core, self.tlb, self.instructions.msrs)
        self.interrupts = Interrupts(core)
        self.pending: Event | None = None

    def advance(self) -> Stop | None:
        """One round. None: nothing for the caller yet."""
        if self.pending is not None:
            stop = self._deliver(self.pending)
            if stop is not None:
                return stop
        if self.mmio.active:
            return self._advance_mmio()
        self.mmio.release()
        interrupts = self.interrupts
        if interrupts.vector is not None or interrupts.nmi or interrupts.window:
            return self._advance_interrupted()
        return self._judge(self.core.emulate())

    def _advance_interrupted(self) -> Stop | None:
        """A round while something from outside waits."""
        event = self.interrupts.poll()
        if isinstance(event, InterruptWindow):
            return event
        if event is not None:
            self.pending = event
            return None
        if self.interrupts.must_step:
            return self._judge(self._step(), stepped=True)
        try:
            return self._judge(self.core.emulate())
        finally:
            self.core.cpu.interrupt_request.value &= REQUEST_INIT

    def answer_port(self, asked: PortIn, value: int) -> Stop | None:
        """Finish the IN or INS that asked. What its last part met; None if it is done."""
        try:
            if self.ports.answer(asked.size, value):
                self._trap_if_traced()
                return None
        except (GuestFault, Stage2Refused) as error:
            return self._not_done(error)
        stop = self._judge(self._step(), stepped=True)
        while stop is None and self.pending is None and self.ports.supplied:
            stop = self._judge(self._step(), stepped=True)
        self.ports.supply = self.ports.supply if isinstance(stop, Stage2Miss) else None
        return stop

    def finish_call(self, call: GuestCall, value: int) -> None:
        """The answer to what a guest has asked by an instruction."""
        self.calls.complete(call, value)
        if not isinstance(call, PAST_INSTRUCTION):
            self._trap_if_traced()

    def finish_msr(self, stop: ReadMsr | WriteMsr, value: int) -> None:
        """The answer to an access to an MSR that is not ours."""
        self.instructions.finish_msr(stop, value)
        self._trap_if_traced()

    def raise_exception(self, asked: Stop | None, event: Event) -> None:
        """`event` at the instruction of the last stop, which has not happened."""
        if isinstance(asked, PAST_INSTRUCTION):
            self.core.cpu.env.eip = self.calls.start
        self.pending = event

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
        if code == uc_native.ERR_EXCEPTION:
            return self._after_exception(core.exception, stepped)
        return self._failed(uc_native.error_text(code))

    def _failed(self, why: str) -> Failed:
        """The stop for what cannot be executed."""
        return Failed(self.core.cpu.env.eip, why)

    def _after_hook(self, cause: Cause) -> Stop | None:
        if isinstance(cause, PortOut):
            return self._finish_port(cause)
        if isinstance(cause, MmioRead):
            return cause
        match cause:
            case Signal.SYSCALL | Signal.SYSENTER:
                self.pending = self.instructions.enter_kernel(cause)
                return None
            case Signal.PORT_IN_DONE:
                return self._finish_port(None)
            case Signal.MMIO_CROSSED:
                return self._failed("an access of two pages, one of which is MMIO")
        self.ports.roll_back()
        if not isinstance(cause, PortIn):
            return self._not_done(cause)
        try:
            return PortIn(cause.port, cause.size, self.ports.ahead(cause.size))
        except (GuestFault, Stage2Refused) as error:
            return self._not_done(error)

    def _finish_port(self, stop: PortOut | None) -> Stop | None:
        """A port instruction is done; `stop` says so."""
        try:
            self.ports.finish()
        except (GuestFault, Stage2Refused) as error:
            return self._not_done(error)
        self._trap_if_traced()
        return stop

    def _not_done(self, why: Stage2Refused | GuestFault) -> Stop | None:
        """An instruction that was rolled back."""
        if isinstance(why, Stage2Refused):
            return self._missed(why)
        self.pending = Event(why.vector, why.error_code, address=why.address)
        return None

    def _after_exception(self, vector: int, stepped: bool) -> Stop | None:
        """An exception of the guest, or VMEXIT and the number of an exit, with RIP on the instruction."""
        if stepped and vector == DB:
            self._trap_if_traced()
        elif vector == VMEXIT + EXIT_INIT:
            return SliceOver()
        elif vector == VMEXIT + EXIT_MSR:
            return self._access_msr()
        elif vector in (VMEXIT + EXIT_WRITE_DR5, VMEXIT + EXIT_WRITE_DR7):
            return self._write_dr7()
        elif vector < VMEXIT:
            tail = self.core.cpu.tail
            length = self.instructions.int_length(vector) if tail.exception_is_int else 0
            self.pending = Event(vector, tail.error_code & 0xFFFF_FFFF, length)
            # QEMU would take the next exception for a second one inside of the delivery of this, and Unicorn would move
            # RIP past an INT that is long done.
            tail.old_exception, tail.exception_is_int = -1, 0
        return None

    def _access_msr(self) -> Stop | None:
        try:
            outcome = self.instructions.access_msr()
        except (GuestFault, Stage2Refused) as error:
            return self._not_done(error)
        if isinstance(outcome, ReadMsr | WriteMsr):
            return outcome
        self.pending = outcome
        if self.pending is None:
            self._trap_if_traced()
        return None

    def _write_dr7(self) -> Stop | None:
        """Let the instruction happen; then port instructions look for breakpoints again, whatever DR7 says."""
        cpu = self.core.cpu
        cpu.tail.intercept_dr_write = 0
        try:
            code = self._step()
        finally:
            cpu.tail.intercept_dr_write = DR_WRITES
            cpu.env.hflags |= HF_IOBPT
        return self._judge(code, stepped=True)

    def _after_refusal(self, refused: Refusal, stepped: bool) -> Stop | None:
        if isinstance(refused, CodeChanged):
            self.tlb.flush_code()
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
        try:
            call = self.calls.at_rip()
        except (GuestFault, Stage2Refused) as error:
            return self._not_done(error)
        if call is None:
            self.pending = Event(UD)
        elif isinstance(call, PAST_INSTRUCTION):
            self._trap_if_traced()
        return call

    def _deliver(self, event: Event) -> Stop | None:
        cpu = self.core.cpu
        regs, sregs = cpu.get_regs(), cpu.get_sregs()
        try:
            entered = deliver(event, regs, sregs, self.tlb.linear_memory())
        except Stage2Refused as refused:
            return self._missed(refused)
        except Unsupported as why:
            return self._failed(str(why))
        self.pending = None
        if not entered:
            cpu.env.cr[2] = sregs.cr2
            return Shutdown()
        self.mmio.forget()
        cpu.set_regs(regs)
        cpu.set_sregs(sregs)
        return None

    def _step(self) -> int:
        """One pass of one instruction."""
        cpu = self.core.cpu
        traced, dr6 = cpu.env.eflags & RFLAGS_TF, cpu.tail.dr[6]
        cpu.env.eflags |= RFLAGS_TF
        try:
            return self.core.step()
        finally:
            cpu.env.eflags = cpu.env.eflags & ~RFLAGS_TF | traced
            cpu.tail.dr[6] = dr6

    def _trap_if_traced(self) -> None:
        """RFLAGS.TF of the guest: #DB follows the instruction that was just completed."""
        cpu = self.core.cpu
        if cpu.env.eflags & RFLAGS_TF:
            cpu.tail.dr[6] |= _DR6_BS
            self.pending = Event(DB)

    def _advance_mmio(self) -> Stop | None:
        """One step of an instruction that uses MMIO."""
        core, mmio = self.core, self.mmio
        mmio.begin()
        try:
            code = self._step()
        finally:
            mmio.end()
        if isinstance(core.cause, PortIn):
            self.ports.roll_back()
            return self._failed("INS to MMIO")
        done = core.cause is None and core.refused is None and core.exception == DB and code == uc_native.ERR_EXCEPTION
        stop = self._judge(code, stepped=True)
        if done or isinstance(stop, PortOut):
            mmio.forget()
        return mmio.next_write() if done else stop
