"""The launch digest: what a guest's owner compares to know what was put into it.

Each page that is added extends it by the SHA-384 of a PAGE_INFO, which has the digest so far in front.

Source: SEV Secure Nested Paging Firmware ABI Specification, 8.17 SNP_LAUNCH_UPDATE, "PAGE_INFO".
"""

from __future__ import annotations

import enum
import hashlib
import struct

DIGEST_BYTES = 48
VMSA_GPA = 0xFFFF_FFFF_F000
_PAGE_INFO = struct.Struct("<48s48sHBBBBBBQ")


class PageType(enum.IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


_MEASURED_CONTENTS = (PageType.NORMAL, PageType.VMSA)


def extend(digest: bytes, page_type: PageType, gpa: int, contents: bytes) -> bytes:
    """The digest after a page of 4096 bytes. `gpa` is in bytes. Contents of other types than NORMAL and VMSA do not
    count: firmware makes them, or nobody promises them."""
    inner = hashlib.sha384(contents).digest() if page_type in _MEASURED_CONTENTS else bytes(DIGEST_BYTES)
    info = _PAGE_INFO.pack(digest, inner, _PAGE_INFO.size, page_type, 0, 0, 0, 0, 0, gpa)
    return hashlib.sha384(info).digest()
