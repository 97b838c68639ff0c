"""The guest policy: what a guest's owner demands of the machine. Firmware refuses to launch where it cannot be had.

    7:0 and 15:8 least minor and major version of the firmware's ABI | 16 SMT is allowed | 17 one
    18 a migration agent is allowed | 19 debugging is allowed | 20 a single socket

Source: SEV Secure Nested Paging Firmware ABI Specification, 4.3 "Guest Policy"; include/linux/psp-sev.h
SNP_POLICY_MASK_BASE.
"""

from __future__ import annotations

SMT = 1 << 16
RESERVED_1 = 1 << 17
MIGRATE_MA = 1 << 18
DEBUG = 1 << 19
SINGLE_SOCKET = 1 << 20
_VERSION = 0xFFFF
FIRMWARE_BITS = _VERSION | SMT | RESERVED_1 | MIGRATE_MA | DEBUG | SINGLE_SOCKET
"""What firmware without the features of later versions (CXL, RAPL, ...) knows."""

DEFAULT = RESERVED_1


def is_met(policy: int, abi_version: tuple[int, int], smt: bool) -> bool:
    """Whether a machine with this version (major, minor) of the firmware's ABI, and with or without SMT, will do."""
    if policy & ~FIRMWARE_BITS or not policy & RESERVED_1:
        return False
    if (policy >> 8 & 0xFF, policy & 0xFF) > abi_version:
        return False
    return not smt or bool(policy & SMT)
