"""Where a mapping may lie: what is reserved, what is allowed, what is free."""

from __future__ import annotations

import pytest

from guestmem import Refusal
from guestmem.iommu.iova_space import RESERVED, U64_MAX, IovaRange, IovaSpace
from guestmem.memory import PAGE_SIZE

K = PAGE_SIZE
M = 1 << 20


def test_a_fresh_space_has_everything_and_a_page_table_narrows_it() -> None:
    space = IovaSpace()
    assert list(space.usable()) == [(0, U64_MAX)]
    space.reserve([])
    assert list(space.usable()) == [(0, 0xFEE0_0000 - 1), (0xFEF0_0000, (1 << 48) - 1)]


def test_room_is_found_as_aligned_as_the_source_is() -> None:
    space = IovaSpace()
    assert space.find(K, 0, []) == K
    assert space.find(2 * M, 0, []) == 2 * M
    assert space.find(2 * M, 5 * M, []) == M
    assert space.find(3 * K, 0, [IovaRange(K, 5 * K - 1)]) == 8 * K
    assert space.find(K, 3 * K, [IovaRange(K, 5 * K - 1)]) == 5 * K


def test_only_what_is_allowed_is_found_but_anything_may_be_asked_for() -> None:
    space = IovaSpace()
    space.allow((IovaRange(M, M + 2 * K - 1),))
    assert space.find(2 * K, 0, []) == M
    with pytest.raises(Refusal, match=r"ENOSPC \[iommu.no_room\]"):
        space.find(2 * K, 0, [IovaRange(M, M + K - 1)])
    space.check(2 * M, K, [])


@pytest.mark.parametrize(
    ("iova", "length", "rule"),
    [
        (1, K, r"EINVAL \[iommu.unaligned\]"),
        ((1 << 64) - K, 2 * K, r"EOVERFLOW \[iommu.overflow\]"),
        (0xFEE0_0000 - K, 2 * K, r"EINVAL \[iommu.iova\]"),
        (1 << 48, K, r"EINVAL \[iommu.iova\]"),
        (8 * K, K, r"EEXIST \[iommu.exists\]"),
    ],
)
def test_a_fixed_address_is_checked_in_the_kernels_order(iova: int, length: int, rule: str) -> None:
    space = IovaSpace()
    space.reserve([])
    with pytest.raises(Refusal, match=rule):
        space.check(iova, length, [IovaRange(8 * K, 9 * K - 1), IovaRange(1 << 48, (1 << 48) + K)])


def test_too_much_is_an_overflow() -> None:
    with pytest.raises(Refusal, match=r"EOVERFLOW"):
        IovaSpace().find(U64_MAX // 2, 0, [])


def test_what_is_used_or_allowed_cannot_be_reserved() -> None:
    space = IovaSpace()
    with pytest.raises(Refusal, match=r"EADDRINUSE \[iommu.reserved\]"):
        space.reserve([RESERVED[0]])
    space.allow((IovaRange(0xFEE0_0000, 0xFEE0_0FFF),))
    with pytest.raises(Refusal, match=r"EADDRINUSE"):
        space.reserve([])
    space.allow(())
    space.reserve([])
    with pytest.raises(Refusal, match=r"EADDRINUSE"):
        space.allow((IovaRange(0, 0xFEE0_0000),))
