"""SEV_STATUS: what the firmware returns. Source: include/uapi/linux/psp-sev.h sev_ret_code, firmware ABI chapter 6."""

from __future__ import annotations

import enum


class SevStatus(enum.IntEnum):
    """As far as it is returned here."""

    SUCCESS = 0
    INVALID_PLATFORM_STATE = 1
    INVALID_GUEST_STATE = 2
    POLICY_FAILURE = 7
    INACTIVE = 8
    BAD_SIGNATURE = 0xA
    BAD_MEASUREMENT = 0xB
    ASID_OWNED = 0xC
    INVALID_ASID = 0xD
    DFFLUSH_REQUIRED = 0xF
    INVALID_GUEST = 0x10
    ACTIVE = 0x12
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_PAGE_OWNER = 0x1C
