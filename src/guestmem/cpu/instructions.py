"""Instructions that Unicorn leaves to its user: CPUID, VMCALL and VMMCALL, SYSCALL and SYSENTER, INT.

CPUID is answered from inside of its hook. SYSCALL ends the pass, because it changes segments. A hypercall is an invalid
instruction to Unicorn, so it is looked at where it stands.
"""

from __future__ import annotations

from functools import partial

from unicorn import x86_const

from guestmem.cpu import cpuid, fast_calls, uc_native
from guestmem.cpu.cpu_state import HF_CPL, HF_CS64
from guestmem.cpu.engine import CpuidTable, Hypercall
from guestmem.cpu.exceptions import BP, OF, Event
from guestmem.cpu.guest_memory import GuestFault, Stage2Refused
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import HOOK_INSTRUCTION, Core, Signal
from guestmem.cpu.x86_env import GENERAL, SEGMENTS

_VMCALL, _VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
_INT3, _INTO = b"\xcc", b"\xce"
_CS = SEGMENTS.index("cs")
_RAX, _RCX, _RDX, _RBX, _RSI = (GENERAL.index(name) for name in ("rax", "rcx", "rdx", "rbx", "rsi"))
_CPUID_ANSWER = (
    x86_const.UC_X86_REG_RAX,
    x86_const.UC_X86_REG_RBX,
    x86_const.UC_X86_REG_RCX,
    x86_const.UC_X86_REG_RDX,
)
_MASK_32, _MASK_64 = (1 << 32) - 1, (1 << 64) - 1


class Instructions:
    """See the module. `cpuid` is the table of CPUID."""

    def __init__(self, core: Core, tlb: Tlb) -> None:
        self._core, self._tlb = core, tlb
        self.cpuid: CpuidTable = {}
        for instruction, callback in (
            (x86_const.UC_X86_INS_CPUID, self._on_cpuid),
            (x86_const.UC_X86_INS_SYSCALL, self._on_syscall),
            (x86_const.UC_X86_INS_SYSENTER, self._on_sysenter),
        ):
            hook = uc_native.InstructionHook(core.guard(callback, 1))
            core.hook(HOOK_INSTRUCTION, hook, instruction=instruction)

    def linear_rip(self) -> int:
        """The linear address of the current instruction."""
        env = self._core.sync().env
        return int(env.segs[_CS].base + env.eip)

    def hypercall(self) -> Hypercall | None:
        """The hypercall at RIP, which moves past it; None if there is none."""
        try:
            code = self._tlb.code_bytes(self.linear_rip(), len(_VMCALL))
        except (GuestFault, Stage2Refused):
            return None
        if code not in (_VMCALL, _VMMCALL):
            return None
        env = self._core.sync().env
        env.eip += len(code)
        mask = _MASK_64 if env.hflags & HF_CS64 else _MASK_32
        nr, rbx, rcx, rdx, rsi = (env.regs[i] & mask for i in (_RAX, _RBX, _RCX, _RDX, _RSI))
        return Hypercall(nr, (rbx, rcx, rdx, rsi), env.hflags & HF_CPL)

    def finish_hypercall(self, value: int) -> None:
        """The result goes to RAX; to EAX outside of 64-bit code."""
        env = self._core.modify().env
        env.regs[_RAX] = value & (_MASK_64 if env.hflags & HF_CS64 else _MASK_32)

    def enter_kernel(self, kind: Signal) -> Event | None:
        """SYSCALL or SYSENTER, which RIP is past. The exception that it raises instead, at the instruction."""
        state = self._core.modify()
        regs, sregs = state.get_regs(), state.get_sregs()
        enter = fast_calls.syscall if kind is Signal.SYSCALL else fast_calls.sysenter
        try:
            enter(regs, sregs, partial(uc_native.msr_read, self._core.handle))
        except GuestFault as fault:
            state.env.eip -= fast_calls.LENGTH
            return Event(fault.vector, fault.error_code)
        state.set_regs(regs)
        state.set_sregs(sregs)
        return None

    def int_length(self, vector: int) -> int:
        """Bytes of the INT instruction before RIP. INT3 and INTO have one, INT n has two."""
        code = self._tlb.code_bytes(self.linear_rip() - 1, 1) if vector in (BP, OF) else b""
        return 1 if code in (_INT3, _INTO) else 2

    def _on_cpuid(self, _uc: int, _data: int) -> int:
        """1 tells Unicorn that CPUID is done."""
        core = self._core
        leaf, subleaf = core.read_register(x86_const.UC_X86_REG_EAX), core.read_register(x86_const.UC_X86_REG_ECX)
        for register, value in zip(_CPUID_ANSWER, cpuid.lookup(self.cpuid, leaf, subleaf), strict=True):
            core.write_register(register, value)
        return 1

    def _on_syscall(self, _uc: int, _data: int) -> int:
        self._core.stop(Signal.SYSCALL)
        return 1

    def _on_sysenter(self, _uc: int, _data: int) -> int:
        self._core.stop(Signal.SYSENTER)
        return 1
