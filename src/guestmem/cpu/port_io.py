"""IN, OUT, INS and OUTS: exits that are exact.

Unicorn calls a hook from the middle of a block and goes on with the instructions that follow. What stops it at once is
an I/O breakpoint: with HF_IOBPT each port instruction asks for one right after its hook, and the hook sets DR0 and DR7
so that it hits. The #DB that it raises ends the pass between the two instructions; the registers of the guest's own
breakpoints are put back, so a guest has no I/O breakpoints.

OUT and OUTS are complete when their exit is seen; a REP OUTS executes one element per exit. IN and INS have executed
with a zero, which is taken back: at the exit, registers are those before the instruction. The value completes IN by
itself; INS is stepped once more for each element, with its value. (INS has written zeros to its destination before it
asks the port, as QEMU has it.) A REP INS asks for as many elements at once as KVM does, and takes as many as the
registers say when the values are there, whatever the VMM has changed. Source: arch/x86/kvm/emulate.c pio_in_emulated.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import x86_const

from guestmem.cpu import uc_native
from guestmem.cpu.cpu_state import HF_CPL, HF_CS64, HF_INHIBIT_IRQ
from guestmem.cpu.engine import PortIn, PortOut
from guestmem.cpu.exceptions import GP, RFLAGS_RF
from guestmem.cpu.guest_memory import PAGE, GuestFault, LinearMemory, Stage2Refused
from guestmem.cpu.guest_walk import CR0_PE
from guestmem.cpu.registers import Sregs
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import HOOK_INSTRUCTION, Core, Signal
from guestmem.cpu.x86_env import GENERAL, SEGMENTS, Env

_REP = frozenset(b"\xf2\xf3")
_ADDRESS_SIZE = 0x67
_CS = SEGMENTS.index("cs")
_RAX, _RCX, _RSI, _RDI = (GENERAL.index(name) for name in ("rax", "rcx", "rsi", "rdi"))
_REGISTERS = struct.Struct(f"<Q40xQQ64xQQ{Env.hflags.offset - Env.cc_dst.offset}xI")
"""RAX, RSI, RDI, EIP, RFLAGS without arithmetic flags, hflags."""
_DR0, _DR6_DR7, _DR6_AT = struct.Struct("<Q"), struct.Struct("<QQ"), 48
_DR7_PORT_IN_DR0 = 0x400 | 2 << 16 | 1
_ANSWER_MASK = {1: ~0xFF, 2: ~0xFFFF, 4: 0}
_HF_CS32 = 1 << 4
_RFLAGS_DF = 1 << 10
_AHEAD_MAX = 1024
"""Bytes that a REP INS asks for at once."""
_MASK_16, _MASK_32, _MASK_64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


class PortIo:
    """The hooks. `supply` is the RIP of an INS and the values that it is to take."""

    def __init__(self, core: Core, tlb: Tlb) -> None:
        self._core, self._tlb = core, tlb
        self._view = core.cpu.view
        dr = core.cpu.tail.dr
        self._debug = memoryview((ctypes.c_char * ctypes.sizeof(dr)).from_address(ctypes.addressof(dr))).cast("B")
        self._before: tuple[int, ...] = (0,) * 6
        self._debug_before: tuple[int, ...] = (0,) * 3
        self._next, self._string = 0, False
        self.supply: tuple[int, bytearray] | None = None
        out, inp = uc_native.OutHook(core.guard(self._out)), uc_native.InHook(core.guard(self._in, 0))
        core.hook(HOOK_INSTRUCTION, out, instruction=x86_const.UC_X86_INS_OUT)
        core.hook(HOOK_INSTRUCTION, inp, instruction=x86_const.UC_X86_INS_IN)

    def _out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        core = self._core
        if core.cause is None:
            core.cause = self._enter(port, size) or PortOut(port, size, value)

    def _in(self, _uc: int, port: int, size: int, _data: int) -> int:
        core = self._core
        if core.cause is not None:
            return 0
        refused = self._enter(port, size)
        if refused is None and self.supply is not None:
            eip, values = self.supply
            if eip == self._before[3] and values:
                value = int.from_bytes(values[:size], "little")
                del values[:size]
                core.cause = Signal.PORT_IN_DONE
                return value
        self.supply = None
        core.cause = refused or PortIn(port, size)
        return 0

    def _enter(self, port: int, size: int) -> GuestFault | Stage2Refused | None:
        """End the pass after this instruction. What happens instead of it, None if it is to happen."""
        before = self._before = _REGISTERS.unpack_from(self._view)
        self._debug_before = _DR0.unpack_from(self._debug) + _DR6_DR7.unpack_from(self._debug, _DR6_AT)
        _DR0.pack_into(self._debug, 0, port)
        _DR6_DR7.pack_into(self._debug, _DR6_AT, 0, _DR7_PORT_IN_DR0)
        if before[5] & HF_CPL > before[4] >> 12 & 3:
            try:
                if not io_permitted(self._core.cpu.get_sregs(), self._tlb.linear_memory(), port, size):
                    return GuestFault(GP, 0)
            except Stage2Refused as refused:
                return refused
        return None

    def _disarm(self) -> None:
        """The guest's own debug registers."""
        dr0, dr6, dr7 = self._debug_before
        _DR0.pack_into(self._debug, 0, dr0)
        _DR6_DR7.pack_into(self._debug, _DR6_AT, dr6, dr7)

    def roll_back(self) -> None:
        """The registers before the instruction."""
        env, before = self._core.cpu.env, self._before
        regs = env.regs
        self._next, self._string = env.eip, regs[_RDI] != before[2]
        regs[_RAX], regs[_RSI], regs[_RDI], env.eip = before[:4]
        self._disarm()

    def finish(self) -> None:
        """The registers after the instruction, or after one element of a REP, which stays where it is.

        Raises, when it has rolled them back: GuestFault, Stage2Refused. The instruction can be repeated.
        """
        self._disarm()
        after = _REGISTERS.unpack_from(self._view)
        if after[1:3] != self._before[1:3]:
            self._count()
        if after[5] & HF_INHIBIT_IRQ or after[4] & RFLAGS_RF:
            self._instruction_done()

    def _count(self) -> None:
        """INS or OUTS: the counter of a REP."""
        env, eip = self._core.cpu.env, self._before[3]
        try:
            mask = self._counter_of_rep(eip, env.eip)
        except (GuestFault, Stage2Refused):
            self.roll_back()
            raise
        if mask:
            count = env.regs[_RCX]
            # A counter of 32 bits clears the upper half; one of 16 leaves the rest.
            env.regs[_RCX] = (count - 1 & mask) | (count & ~_MASK_16 if mask == _MASK_16 else 0)
            env.eip = eip

    def _counter_of_rep(self, eip: int, after: int) -> int:
        """The bits of the counter of the instruction at `eip`: the size of addresses. 0 without a REP."""
        env = self._core.cpu.env
        code = self._tlb.code_bytes(env.segs[_CS].base + eip, after - eip)
        if not _REP & set(code):
            return 0
        other_size = _ADDRESS_SIZE in code
        if env.hflags & HF_CS64:
            return _MASK_32 if other_size else _MASK_64
        return _MASK_16 if bool(env.hflags & _HF_CS32) is other_size else _MASK_32

    def ahead(self, size: int) -> int:
        """How many elements of `size` bytes the INS that was rolled back asks for.

        Raises: GuestFault, Stage2Refused.
        """
        env = self._core.cpu.env
        mask = self._counter_of_rep(env.eip, self._next) if self._string else 0
        if not mask:
            return 1
        offset = int(env.regs[_RDI]) & PAGE - 1
        in_page = offset if env.eflags & _RFLAGS_DF else PAGE - offset
        return max(1, min(in_page, _AHEAD_MAX // size, int(env.regs[_RCX]) & mask))

    def answer(self, size: int, value: int) -> bool:
        """`value` for what was rolled back. False for an INS: it takes as many steps as there are values in `supply`.

        Raises: GuestFault, Stage2Refused.
        """
        env = self._core.cpu.env
        if self._string:
            length = self.ahead(size) * size
            self.supply = env.eip, bytearray((value & (1 << length * 8) - 1).to_bytes(length, "little"))
            return False
        env.regs[_RAX] = env.regs[_RAX] & _ANSWER_MASK[size] | value & (1 << size * 8) - 1
        env.eip = self._next
        self._instruction_done()
        return True

    @property
    def supplied(self) -> bool:
        """Whether the instruction at RIP is an INS for which there are values."""
        return self.supply is not None and bool(self.supply[1]) and self.supply[0] == self._core.cpu.env.eip

    def _instruction_done(self) -> None:
        """What lasts for one instruction is over."""
        env = self._core.cpu.env
        env.hflags &= ~HF_INHIBIT_IRQ
        env.eflags &= ~RFLAGS_RF


def io_permitted(sregs: Sregs, memory: LinearMemory, port: int, size: int) -> bool:
    """Whether the I/O bitmap of the TSS lets a program use `size` ports. Raises: Stage2Refused.

    Source: Intel SDM vol. 1, 19.5.2 "I/O permission bit map".
    """
    tr = sregs.tr
    try:
        base = memory.read(tr.base + 102, 2) + (port >> 3)
        if not sregs.cr0 & CR0_PE or not tr.type & 8 or base + 1 > tr.limit:
            return False
        return not memory.read(tr.base + base, 2) >> (port & 7) & (1 << size) - 1
    except GuestFault:
        return False
