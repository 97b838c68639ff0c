"""struct kvm_lapic_state: a local APIC as the 1024 bytes of KVM_GET_LAPIC and KVM_SET_LAPIC.

The layout is that of the MMIO page. In x2APIC mode the ID stands in bits 31:24 as in an xAPIC, unless the VMM has
chosen KVM_X2APIC_API_USE_32BIT_IDS, and ICR2 is the upper half of ICR.

Source: arch/x86/kvm/lapic.c kvm_apic_get_state, kvm_apic_set_state, kvm_apic_state_fixup.
"""

from __future__ import annotations

import struct

from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.kvm.irqchip.lapic import Lapic
from guestmem.kvm.irqchip.lapic_timer import TimerMode

SIZE = 1024
_BANKS = ((reg.ISR, "isr"), (reg.TMR, "tmr"), (reg.IRR, "irr"))


def pack(lapic: Lapic, has_32_bit_ids: bool) -> bytes:
    """The state."""
    page = bytearray(SIZE)
    for register in reg.READABLE - {reg.ARBITRATION}:
        _put(page, register, lapic.read(register) or 0)
    _put(page, reg.DFR, lapic.dfr)
    _put(page, reg.ICR2, lapic.icr >> 32)
    if lapic.is_x2apic and not has_32_bit_ids:
        _put(page, reg.ID, lapic.number << 24 & 0xFFFF_FFFF)
    return bytes(page)


def unpack(lapic: Lapic, page: bytes, has_32_bit_ids: bool) -> bool:
    """Take over a state; False if it has an ID that an x2APIC cannot have, which changes nothing."""
    identity = _get(page, reg.ID)
    if lapic.is_x2apic and (identity if has_32_bit_ids else identity >> 24) != lapic.number:
        return False
    lapic.timer.stop()
    if not lapic.is_x2apic:
        lapic.id = identity >> 24
        lapic.ldr, lapic.dfr = _get(page, reg.LDR), _get(page, reg.DFR)
    lapic.icr = _get(page, reg.ICR) | _get(page, reg.ICR2) << 32
    lapic.tpr, lapic.esr = _get(page, reg.TPR) & 0xFF, _get(page, reg.ESR)
    lapic.write(reg.SVR, _get(page, reg.SVR))
    for bank, name in _BANKS:
        words = struct.unpack_from("<" + "I12x" * 7 + "I", page, bank << 4)
        setattr(lapic, name, sum(word << 32 * place for place, word in enumerate(words)))
    lapic.lvt = {entry: _get(page, entry) for entry in lapic.lvt}
    lapic.timer.set_mode(TimerMode(lapic.lvt[reg.LVT_TIMER] >> reg.TIMER_MODE_SHIFT & 3))
    lapic.set_divide(_get(page, reg.DIVIDE))
    lapic.timer.restore(_get(page, reg.INITIAL_COUNT), _get(page, reg.CURRENT_COUNT))
    lapic.restored()
    return True


def _get(page: bytes, register: int) -> int:
    return int.from_bytes(page[register << 4 : (register << 4) + 4], "little")


def _put(page: bytearray, register: int, value: int) -> None:
    page[register << 4 : (register << 4) + 4] = value.to_bytes(4, "little")
