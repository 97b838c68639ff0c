"""What fallocate(2) may ask of a guest_memfd: the checks of the VFS, then those of guest_memfd, in the kernel's order.

Sources: fs/open.c vfs_fallocate (6.18), virt/kvm/guest_memfd.c kvm_gmem_fallocate; spec/uapi.md section 8, confirmed on
Linux 6.18 by spec/golden_6_18.md rows F1 to F54.
"""

from __future__ import annotations

import errno

from guestmem.memory.pages import PageRange, page_range
from guestmem.trace import Refusal

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_INSERT_RANGE = 0x20
FALLOC_FL_UNSHARE_RANGE = 0x40
FALLOC_FL_WRITE_ZEROES = 0x80
MAX_FILE_SIZE = (1 << 63) - 1

_KEEP_SIZE_ALLOWED = {0, FALLOC_FL_ZERO_RANGE, FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_PUNCH_HOLE}
_KEEP_SIZE_OPTIONAL = _KEEP_SIZE_ALLOWED - {FALLOC_FL_PUNCH_HOLE}
_KEEP_SIZE_FORBIDDEN = {FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_WRITE_ZEROES}


def check_fallocate(mode: int, offset: int, length: int, folio_size: int) -> PageRange:
    """The pages that a legal call means. All but the end of the file is checked: a hole may lie beyond it.

    Memory is allocated by whole folios of `folio_size` bytes; a hole need not be: where it covers a part of one, that
    part is zeroed and stays.

    Raises: Refusal EINVAL `fallocate.range`; EOPNOTSUPP `fallocate.mode`; EFBIG `fallocate.too_big`; EOPNOTSUPP
    `fallocate.gmem_mode`; EINVAL `fallocate.unaligned`. In this order.
    """
    if offset < 0 or length <= 0:
        raise Refusal(errno.EINVAL, "fallocate.range", offset=offset, length=length)
    kind = mode & ~FALLOC_FL_KEEP_SIZE
    keeps_size = bool(mode & FALLOC_FL_KEEP_SIZE)
    if kind not in (_KEEP_SIZE_ALLOWED if keeps_size else _KEEP_SIZE_OPTIONAL | _KEEP_SIZE_FORBIDDEN):
        raise Refusal(errno.EOPNOTSUPP, "fallocate.mode", mode=mode)
    if offset + length > MAX_FILE_SIZE:
        raise Refusal(errno.EFBIG, "fallocate.too_big", offset=offset, length=length)
    if not keeps_size or kind not in (0, FALLOC_FL_PUNCH_HOLE):
        raise Refusal(errno.EOPNOTSUPP, "fallocate.gmem_mode", mode=mode)
    pages = page_range(offset, length)
    if pages is None or (not kind and (offset | length) & (folio_size - 1)):
        raise Refusal(errno.EINVAL, "fallocate.unaligned", offset=offset, length=length, page_size=folio_size)
    return pages
