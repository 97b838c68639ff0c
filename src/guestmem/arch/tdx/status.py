"""Completion status of the TDX module's calls: bits 63:32 say what happened, bits 31:0 often which operand was wrong.

Source: TDX module ABI specification, "Function Completion Status Codes"; intel/tdx-module
include/auto_gen_2_0/tdx_error_codes_defs.h.
"""

from __future__ import annotations

import enum
from errno import EBUSY, EINVAL, EIO

from guestmem.arch.architecture import FirmwareError


class Status(enum.IntEnum):
    """Bits 63:32. Set bit 63: an error; bit 62 as well: one that does not go away by itself."""

    SUCCESS = 0
    OPERAND_INVALID = 0xC0000100
    OPERAND_BUSY = 0x80000200
    PREVIOUS_TLB_EPOCH_BUSY = 0x80000201
    PAGE_METADATA_INCORRECT = 0xC0000300
    PAGE_NOT_FREE = 0xC0000303
    HPA_RANGE_NOT_FREE = 0xC0000304
    NO_PAMT_PAGE_PAIR = 0xC0000305
    PAMT_PAGE_NOT_EMPTY = 0xC0000306
    MISSING_PAMT_PAGE_PAIR = 0x80000308
    TD_ASSOCIATED_PAGES_EXIST = 0xC0000400
    TDCS_NOT_ALLOCATED = 0xC0000606
    LIFECYCLE_STATE_INCORRECT = 0xC0000607
    OP_STATE_INCORRECT = 0xC0000608
    NO_VCPUS = 0xC0000609
    TDCX_NUM_INCORRECT = 0xC0000610
    VCPU_STATE_INCORRECT = 0xC0000700
    VCPU_ASSOCIATED = 0x80000701
    VCPU_NOT_ASSOCIATED = 0x80000702
    TD_KEYS_NOT_CONFIGURED = 0x80000810
    KEY_CONFIGURED = 0x00000815
    WBCACHE_NOT_COMPLETE = 0x80000817
    HKID_NOT_FREE = 0xC0000820
    NO_HKID_READY_TO_WBCACHE = 0x00000821
    FLUSHVP_NOT_DONE = 0x80000824
    EPT_WALK_FAILED = 0xC0000B00
    EPT_ENTRY_NOT_PRESENT = 0xC0000B03
    GPA_RANGE_NOT_BLOCKED = 0xC0000B06
    GPA_RANGE_ALREADY_BLOCKED = 0x00000B07
    TLB_TRACKING_NOT_DONE = 0xC0000B08
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC0000B09
    PAGE_ALREADY_ACCEPTED = 0x00000B0A
    PAGE_SIZE_MISMATCH = 0xC0000B0B
    EPT_ENTRY_STATE_INCORRECT = 0xC0000B0D
    EPT_PAGE_NOT_FREE = 0xC0000B0E


class Operand(enum.IntEnum):
    """Bits 31:0: the register or object that is at fault."""

    NONE = -1
    RAX = 0
    RCX = 1
    RDX = 2
    R8 = 8
    ATTRIBUTES = 64
    XFAM = 65
    CPUID_CONFIG = 69
    TDR = 128
    TD_EPOCH = 169
    KOT = 186


_ANSWERS = {
    ("TDH.MNG.INIT", Status.OPERAND_INVALID): EINVAL,
    ("TDH.MEM.PAGE.ADD", Status.OPERAND_BUSY): EBUSY,
    ("TDH.MR.FINALIZE", Status.OPERAND_BUSY): EBUSY,
}
"""What KVM answers besides EIO. Source: tdx.c __tdx_td_init, tdx_gmem_post_populate, tdx_td_finalize."""


class TdxError(FirmwareError):
    """A call of the module that did not succeed, and changed nothing. `status` is all of RAX; `detail` stands in its
    lower half where no operand does."""

    def __init__(
        self, call: str, status: Status, operand: Operand = Operand.NONE, detail: int = 0, **facts: object
    ) -> None:
        self.status = status << 32 | (detail if operand is Operand.NONE else operand)
        self.answer = _ANSWERS.get((call, status), EIO)
        code = f"TDX_{status.name}" + (f"|{operand.name}" if operand is not Operand.NONE else "")
        super().__init__(call, code, None, **facts)
