"""Names of the local APIC's registers: the offset in the MMIO page divided by 16, and of the MSR above 0x800.

Source: Intel SDM vol. 3, table 11-1 "Local APIC register address map", table 11-6 for x2APIC.
"""

from __future__ import annotations

ID, VERSION, TPR, ARBITRATION, PPR, EOI, REMOTE_READ = 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x0C
LDR, DFR, SVR, ISR, TMR, IRR, ESR = 0x0D, 0x0E, 0x0F, 0x10, 0x18, 0x20, 0x28
LVT_CMCI, ICR, ICR2, LVT_TIMER, LVT_THERMAL, LVT_PERF = 0x2F, 0x30, 0x31, 0x32, 0x33, 0x34
LVT0, LVT1, LVT_ERROR, INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x35, 0x36, 0x37, 0x38, 0x39, 0x3E, 0x3F

LVT_MASKED = 1 << 16
LVT_MODE_SHIFT, LVT_LEVEL = 8, 1 << 15
TIMER_MODE_SHIFT = 17
_LVT = LVT_MASKED | 1 << 12 | 0xFF
_LVT_WITH_MODE = _LVT | 7 << LVT_MODE_SHIFT
_LINT = _LVT_WITH_MODE | LVT_LEVEL | 1 << 14 | 1 << 13
LVT_WRITABLE = {
    LVT_TIMER: _LVT,  # and the timer's modes that CPUID offers
    LVT_THERMAL: _LVT_WITH_MODE,
    LVT_PERF: _LVT_WITH_MODE,
    LVT0: _LINT,
    LVT1: _LINT,
    LVT_ERROR: _LVT,
}

SVR_ENABLED, SVR_NO_EOI_BROADCAST = 1 << 8, 1 << 12
VERSION_NO_EOI_BROADCAST = 1 << 24
VERSION_VALUE = 0x14 | len(LVT_WRITABLE) - 1 << 16

ICR_BUSY, ICR_LOGICAL, ICR_ASSERTED, ICR_LEVEL = 1 << 12, 1 << 11, 1 << 14, 1 << 15
ICR_SHORTHAND_SHIFT = 18
X2APIC_ICR_RESERVED = 0xFFF << 20 | 3 << 16 | 1 << 13

BASE_DEFAULT = 0xFEE0_0000
BASE_BSP, BASE_X2APIC, BASE_ENABLED = 1 << 8, 1 << 10, 1 << 11

READABLE = frozenset(
    (
        *(ID, VERSION, TPR, ARBITRATION, PPR, LDR, DFR, SVR, ESR, ICR, ICR2, INITIAL_COUNT, CURRENT_COUNT, DIVIDE),
        *LVT_WRITABLE,
        *range(ISR, IRR + 8),
    )
)
NOT_IN_X2APIC = frozenset((ARBITRATION, DFR, ICR2))
"""Registers of the page that are no MSRs."""
