"""SYSCALL and SYSENTER. Unicorn only skips them; the way back (SYSRET, SYSEXIT) it executes itself. `msr` is RDMSR.

Source: AMD APM vol. 3 "SYSCALL", Intel SDM vol. 2 "SYSENTER".
"""

from __future__ import annotations

from collections.abc import Callable

from guestmem.cpu.exceptions import GP, RFLAGS_IF, RFLAGS_RF, RFLAGS_VM, UD
from guestmem.cpu.guest_memory import GuestFault
from guestmem.cpu.guest_walk import CR0_PE, EFER_LMA, EFER_SCE
from guestmem.cpu.registers import Regs, Segment, Sregs

MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
LENGTH = 2
"""Of both instructions, bytes."""


def syscall(regs: Regs, sregs: Sregs, msr: Callable[[int], int]) -> None:
    """SYSCALL; `regs.rip` is past it. Raises: GuestFault (#UD) if EFER.SCE is clear or the CPU is not in long mode."""
    if not sregs.efer & EFER_SCE or not sregs.efer & EFER_LMA:
        raise GuestFault(UD, 0)
    regs.rcx, regs.r11 = regs.rip, regs.rflags
    regs.rip = msr(MSR_LSTAR if sregs.cs.l else MSR_CSTAR)
    regs.rflags &= ~(msr(MSR_FMASK) | RFLAGS_RF)
    _enter_flat(sregs, msr(MSR_STAR) >> 32 & 0xFFFC, long_mode=True)


def sysenter(regs: Regs, sregs: Sregs, msr: Callable[[int], int]) -> None:
    """SYSENTER. Raises: GuestFault (#GP) in real mode and if IA32_SYSENTER_CS is null."""
    selector = msr(MSR_SYSENTER_CS) & 0xFFFC
    if not sregs.cr0 & CR0_PE or not selector:
        raise GuestFault(GP, 0)
    long_mode = bool(sregs.efer & EFER_LMA)
    mask = 0xFFFF_FFFF_FFFF_FFFF if long_mode else 0xFFFF_FFFF
    regs.rsp, regs.rip = msr(MSR_SYSENTER_ESP) & mask, msr(MSR_SYSENTER_EIP) & mask
    regs.rflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM)
    _enter_flat(sregs, selector, long_mode)


def _enter_flat(sregs: Sregs, selector: int, long_mode: bool) -> None:
    """CS and SS of ring 0 with fixed contents: both instructions read no descriptor."""
    bits = int(long_mode)
    sregs.cs = Segment(0, 0xFFFF_FFFF, selector, type=11, dpl=0, db=1 - bits, l=bits, g=1)
    sregs.ss = Segment(0, 0xFFFF_FFFF, selector + 8, type=3, dpl=0, db=1, g=1)
