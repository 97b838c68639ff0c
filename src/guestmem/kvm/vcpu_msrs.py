"""The MSRs of a vCPU that are KVM's and not the engine's: those of the local APIC, kvmclock's, machine checks'.

The engine stops at them (`STOPS`), and comes here; so do KVM_GET_MSRS and KVM_SET_MSRS. All others are the engine's.

Source: arch/x86/kvm/x86.c kvm_get_msr_common, kvm_set_msr_common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from guestmem.cpu.engine import CpuState
from guestmem.cpu.msrs import APIC_BASE, TSC, TSC_ADJUST
from guestmem.kvm import kvmclock, mce
from guestmem.kvm.irqchip import lapic_registers

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu

TSC_DEADLINE = 0x6E0
X2APIC = range(0x800, 0x900)
APIC_STOPS = (range(APIC_BASE, APIC_BASE + 1), range(TSC_DEADLINE, TSC_DEADLINE + 1), X2APIC)
_REGISTERS = 0x40
_TSC_AND_TIMERS = frozenset((TSC, TSC_ADJUST))


def stops(vcpu: Vcpu) -> tuple[range, ...]:
    """What the engine of `vcpu` is to stop at."""
    return mce.STOPS + (kvmclock.STOPS if vcpu.lapic is None else kvmclock.STOPS + APIC_STOPS)


def is_known(vcpu: Vcpu, index: int) -> bool:
    """Whether there is such a register, if only one that refuses this access."""
    return any(index in range_ for range_ in stops(vcpu)) or cast(CpuState, vcpu.engine).get_msr(index) is not None


def get_msr(vcpu: Vcpu, index: int, from_guest: bool = False) -> int | None:
    """None if there is no such register, or it cannot be read now."""
    lapic = vcpu.lapic
    if vcpu.machine_check.has(index):
        return vcpu.machine_check.get(index, from_guest)
    if index in kvmclock.MSRS:
        return vcpu.clock.read(index)
    if lapic is None:
        return 0 if index == TSC_DEADLINE else cast(CpuState, vcpu.engine).get_msr(index)
    if index == APIC_BASE:
        return lapic.base
    if index == TSC_DEADLINE:
        return lapic.timer.tsc_deadline
    if index in X2APIC:
        register = index - X2APIC.start
        return lapic.msr_read(register) if register < _REGISTERS else None
    return cast(CpuState, vcpu.engine).get_msr(index)


def set_msr(vcpu: Vcpu, index: int, value: int, from_guest: bool = False) -> bool:
    """False if there is no such register, or it does not take the value."""
    lapic = vcpu.lapic
    if vcpu.machine_check.has(index):
        return vcpu.machine_check.set(index, value, from_guest)
    if index in kvmclock.MSRS:
        vcpu.clock.write(index, value)
        return True
    if lapic is None:
        return index == TSC_DEADLINE or _set_in_engine(vcpu, index, value)
    if index == APIC_BASE:
        return lapic.set_base(value, from_guest)
    if index == TSC_DEADLINE:
        lapic.timer.set_tsc_deadline(value)
        return True
    if index in X2APIC:
        register = index - X2APIC.start
        done = register < _REGISTERS and lapic.msr_write(register, value)
        if register == lapic_registers.TPR:
            vcpu.interrupts.give_tpr()
        return done
    return _set_in_engine(vcpu, index, value)


def _set_in_engine(vcpu: Vcpu, index: int, value: int) -> bool:
    """Another TSC moves what is counted by it."""
    done = cast(CpuState, vcpu.engine).set_msr(index, value)
    if index in _TSC_AND_TIMERS and done:
        vcpu.clock.is_stale = True
        if vcpu.lapic is not None:
            vcpu.lapic.timer.tsc_changed()
    return done
