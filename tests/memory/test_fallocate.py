"""fallocate's checks: rows F1 to F54 of golden_6_18.md, in the kernel's order. File of 2 MiB."""

from __future__ import annotations

import pytest

from guestmem.memory.fallocate import check_fallocate
from guestmem.trace import Refusal, errno_name
from tests.memory.conftest import Provider

K = 4096
SIZE = 2 << 20
KEEP, PUNCH, COLLAPSE, ZERO, INSERT, UNSHARE, NO_HIDE, WRITE_ZEROES = 1, 2, 8, 16, 32, 64, 4, 128
HUGE = 0x7FFF_FFFF_FFFF_F000

ROWS = [
    ("F1", 0, 0, K, "EOPNOTSUPP"),
    ("F2", KEEP, 0, K, None),
    ("F3", KEEP, 0, SIZE, None),
    ("F4", PUNCH, 0, K, "EOPNOTSUPP"),
    ("F5", PUNCH | KEEP, 0, K, None),
    ("F6", PUNCH | KEEP, 0, SIZE, None),
    ("F7", COLLAPSE, 0, K, "EOPNOTSUPP"),
    ("F8", COLLAPSE | KEEP, 0, K, "EOPNOTSUPP"),
    ("F9", ZERO, 0, K, "EOPNOTSUPP"),
    ("F10", ZERO | KEEP, 0, K, "EOPNOTSUPP"),
    ("F11", INSERT, 0, K, "EOPNOTSUPP"),
    ("F12", INSERT | KEEP, 0, K, "EOPNOTSUPP"),
    ("F13", UNSHARE, 0, K, "EOPNOTSUPP"),
    ("F14", UNSHARE | KEEP, 0, K, "EOPNOTSUPP"),
    ("F15", NO_HIDE, 0, K, "EOPNOTSUPP"),
    ("F16", WRITE_ZEROES, 0, K, "EOPNOTSUPP"),
    ("F17", WRITE_ZEROES | KEEP, 0, K, "EOPNOTSUPP"),
    ("F18", PUNCH | ZERO | KEEP, 0, K, "EOPNOTSUPP"),
    ("F19", 0x1000 | KEEP, 0, K, "EOPNOTSUPP"),
    ("F20", KEEP, 1, K, "EINVAL"),
    ("F21", KEEP, 0, 1, "EINVAL"),
    ("F22", KEEP, 0, 4095, "EINVAL"),
    ("F23", PUNCH | KEEP, 1, K, "EINVAL"),
    ("F24", PUNCH | KEEP, 0, 1, "EINVAL"),
    ("F25", PUNCH | KEEP, 2048, K, "EINVAL"),
    ("F26", 0, 1, 1, "EOPNOTSUPP"),
    ("F27", COLLAPSE, 1, 1, "EOPNOTSUPP"),
    ("F28", KEEP, 0, 0, "EINVAL"),
    ("F29", KEEP, 0, -1, "EINVAL"),
    ("F30", KEEP, 0, -K, "EINVAL"),
    ("F31", KEEP, -K, K, "EINVAL"),
    ("F32", PUNCH | KEEP, 0, 0, "EINVAL"),
    ("F33", PUNCH | KEEP, -K, K, "EINVAL"),
    ("F34", PUNCH | KEEP, 0, -K, "EINVAL"),
    ("F35", 0, 0, 0, "EINVAL"),
    ("F36", 0x1000, 0, 0, "EINVAL"),
    ("F37", 0x1000, 0, K, "EOPNOTSUPP"),
    ("F38", KEEP, SIZE, K, "EINVAL"),
    ("F39", KEEP, SIZE - K, 2 * K, "EINVAL"),
    ("F40", KEEP, 2 * SIZE, K, "EINVAL"),
    ("F41", PUNCH | KEEP, SIZE, K, None),
    ("F42", PUNCH | KEEP, SIZE - K, 2 * K, None),
    ("F43", PUNCH | KEEP, 2 * SIZE, K, None),
    ("F44", PUNCH | KEEP, 0, HUGE, None),
    ("F45", PUNCH | KEEP, K, HUGE, "EFBIG"),
    ("F46", KEEP, K, HUGE, "EFBIG"),
    ("F47", KEEP, 0, HUGE, "EINVAL"),
    ("F48", PUNCH | KEEP, HUGE, K, "EFBIG"),
    ("F51", KEEP, 0, K, None),
]


@pytest.mark.parametrize(("row", "mode", "offset", "length", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_fallocate_answers_as_linux_6_18_did(
    row: str, mode: int, offset: int, length: int, expected: str | None
) -> None:
    provider = Provider(pages=SIZE // K, capacity=1024)
    answer = None
    try:
        provider.run(provider.inode.fallocate(mode, offset, length))
    except Refusal as refusal:
        answer = errno_name(refusal.errno)
    provider.close()
    assert answer == expected


TWO_FAULTS = [
    # the earlier check of uapi.md section 8 wins
    ("range before mode", 0x1000, 0, 0, "fallocate.range"),
    ("mode before size", 0x1000, K, HUGE, "fallocate.mode"),
    ("size before what guest_memfd supports", ZERO, K, HUGE, "fallocate.too_big"),
    ("support before alignment", ZERO, 1, 1, "fallocate.gmem_mode"),
    ("alignment before the end of the file", KEEP, SIZE + 1, K, "fallocate.unaligned"),
]


@pytest.mark.parametrize(("mode", "offset", "length", "rule"), [row[1:] for row in TWO_FAULTS], ids=lambda v: str(v))
def test_of_two_faults_the_earlier_check_answers(mode: int, offset: int, length: int, rule: str) -> None:
    with pytest.raises(Refusal) as caught:
        check_fallocate(mode, offset, length, folio_size=K)
    assert caught.value.rule == rule
