"""What the provider asks of a roaring bitmap beside its own methods: members of a stretch, in order."""

from __future__ import annotations

from collections.abc import Iterator

from pyroaring import BitMap64


def next_member(bitmap: BitMap64, start: int, limit: int) -> int:
    """The first member from `start` on, `limit` if there is none below it."""
    if not bitmap or start > bitmap.max():
        return limit
    return min(int(bitmap.next_set_bit(start)), limit)


def members(bitmap: BitMap64, start: int, limit: int) -> Iterator[int]:
    """The members from `start` up to, not including, `limit`."""
    member = next_member(bitmap, start, limit)
    while member < limit:
        yield member
        member = next_member(bitmap, member + 1, limit)
