"""Instructions that Unicorn leaves to its user: CPUID, RDTSC, MSRs, SYSCALL and SYSENTER, INT. See also `guest_calls`.

CPUID and RDTSC are answered from inside of their hook. RDMSR and WRMSR are exits of the CPU, and done here. SYSCALL
ends the pass, because it changes segments.
"""

from __future__ import annotations

from unicorn import x86_const

from guestmem.cpu import cpuid, fast_calls, uc_native
from guestmem.cpu.cpu_state import HF_INHIBIT_IRQ
from guestmem.cpu.engine import ReadMsr, WriteMsr
from guestmem.cpu.exceptions import BP, GP, OF, RFLAGS_RF, Event
from guestmem.cpu.guest_memory import GuestFault
from guestmem.cpu.msrs import Msrs
from guestmem.cpu.tlb import Tlb
from guestmem.cpu.uc_core import HOOK_INSTRUCTION, Core, Signal
from guestmem.cpu.x86_env import GENERAL, SEGMENTS

_INT3, _INTO = b"\xcc", b"\xce"
_TWO_BYTES, _RDMSR = 0x0F, 0x32
_CS = SEGMENTS.index("cs")
_RAX, _RCX, _RDX = (GENERAL.index(name) for name in ("rax", "rcx", "rdx"))
_CPUID_ANSWER = (
    x86_const.UC_X86_REG_RAX,
    x86_const.UC_X86_REG_RBX,
    x86_const.UC_X86_REG_RCX,
    x86_const.UC_X86_REG_RDX,
)
_MASK_32 = (1 << 32) - 1


class Instructions:
    """See the module."""

    def __init__(self, core: Core, tlb: Tlb) -> None:
        self._core, self._tlb = core, tlb
        self.stop_msrs: tuple[range, ...] = ()
        self.stop_unknown_msrs = False
        self._stopped_length = 0
        self.msrs = Msrs(core.handle, core.cpu, tlb.page_bit)
        for instruction, callback in (
            (x86_const.UC_X86_INS_CPUID, self._on_cpuid),
            (x86_const.UC_X86_INS_RDTSC, self._on_rdtsc),
            (x86_const.UC_X86_INS_RDTSCP, self._on_rdtscp),
            (x86_const.UC_X86_INS_SYSCALL, self._on_syscall),
            (x86_const.UC_X86_INS_SYSENTER, self._on_sysenter),
        ):
            hook = uc_native.InstructionHook(core.guard(callback, 1))
            core.hook(HOOK_INSTRUCTION, hook, instruction=instruction)

    def linear_rip(self) -> int:
        """The linear address of the current instruction."""
        env = self._core.cpu.env
        return int(env.segs[_CS].base + env.eip)

    def enter_kernel(self, kind: Signal) -> Event | None:
        """SYSCALL or SYSENTER, which RIP is past. The exception that it raises instead, at the instruction."""
        cpu = self._core.cpu
        regs, sregs = cpu.get_regs(), cpu.get_sregs()
        enter = fast_calls.syscall if kind is Signal.SYSCALL else fast_calls.sysenter
        try:
            enter(regs, sregs, self._msr)
        except GuestFault as fault:
            cpu.env.eip -= fast_calls.LENGTH
            return Event(fault.vector, fault.error_code)
        cpu.set_regs(regs)
        cpu.set_sregs(sregs)
        return None

    def access_msr(self) -> Event | ReadMsr | WriteMsr | None:
        """RDMSR or WRMSR at RIP, which moves past it. The exception that it raises, or the stop that it is, instead.

        Raises: GuestFault, Stage2Refused.
        """
        env, place = self._core.cpu.env, self.linear_rip()
        code = self._tlb.code_bytes(place, 2)
        while code[-2] != _TWO_BYTES:
            code += self._tlb.code_bytes(place + len(code), 1)
        index = env.regs[_RCX] & _MASK_32
        if self._stops_at(index):
            self._stopped_length = len(code)
            written = env.regs[_RAX] & _MASK_32 | (env.regs[_RDX] & _MASK_32) << 32
            return ReadMsr(index) if code[-1] == _RDMSR else WriteMsr(index, written)
        if code[-1] == _RDMSR:
            value = self.msrs.get(index)
            if value is None:
                return Event(GP)
            env.regs[_RAX], env.regs[_RDX] = value & _MASK_32, value >> 32
        elif not self.msrs.set(index, env.regs[_RAX] & _MASK_32 | (env.regs[_RDX] & _MASK_32) << 32, guest=True):
            return Event(GP)
        self._move_past(len(code))
        return None

    def _stops_at(self, index: int) -> bool:
        if self.stop_unknown_msrs and self.msrs.get(index) is None:
            return True
        return any(index in range_ for range_ in self.stop_msrs)

    def finish_msr(self, stop: ReadMsr | WriteMsr, value: int) -> None:
        """What was stopped at, with the answer."""
        regs = self._core.cpu.env.regs
        if isinstance(stop, ReadMsr):
            regs[_RAX], regs[_RDX] = value & _MASK_32, value >> 32
        self._move_past(self._stopped_length)

    def _move_past(self, length: int) -> None:
        env = self._core.cpu.env
        env.eip += length
        env.hflags &= ~HF_INHIBIT_IRQ
        env.eflags &= ~RFLAGS_RF

    def int_length(self, vector: int) -> int:
        """Bytes of the INT instruction before RIP. INT3 and INTO have one, INT n has two."""
        code = self._tlb.code_bytes(self.linear_rip() - 1, 1) if vector in (BP, OF) else b""
        return 1 if code in (_INT3, _INTO) else 2

    def _on_cpuid(self, _uc: int, _data: int) -> int:
        """1 tells Unicorn that CPUID is done."""
        core = self._core
        leaf, subleaf = core.read_register(x86_const.UC_X86_REG_EAX), core.read_register(x86_const.UC_X86_REG_ECX)
        for register, value in zip(_CPUID_ANSWER, cpuid.lookup(self.msrs.cpuid, leaf, subleaf), strict=True):
            core.write_register(register, value)
        return 1

    def _on_rdtsc(self, _uc: int, _data: int) -> int:
        regs, value = self._core.cpu.env.regs, self.msrs.tsc()
        regs[_RAX], regs[_RDX] = value & _MASK_32, value >> 32
        return 1

    def _on_rdtscp(self, uc: int, data: int) -> int:
        self._core.cpu.env.regs[_RCX] = self._core.cpu.msrs.tsc_aux & _MASK_32
        return self._on_rdtsc(uc, data)

    def _msr(self, index: int) -> int:
        """One that there is."""
        value = self.msrs.get(index)
        assert value is not None
        return value

    def _on_syscall(self, _uc: int, _data: int) -> int:
        self._core.stop(Signal.SYSCALL)
        return 1

    def _on_sysenter(self, _uc: int, _data: int) -> int:
        self._core.stop(Signal.SYSENTER)
        return 1
