"""swiotlb: the bounce buffers of a confidential guest that does I/O.

At boot the guest shares one region: 6 % of its memory, at least 64 MiB and at most 1 GiB, at the top of low memory
(arch/x86/mm/mem_encrypt.c mem_encrypt_setup_arch; kernel/dma/swiotlb.c swiotlb_update_mem_attributes), 2 MiB a request.
Then, with CONFIG_SWIOTLB_DYNAMIC, when the region is full (swiotlb_find_slots, swiotlb_dyn_alloc):

- a request that finds no room gets a transient pool of its own, 4 to 256 KiB (IO_TLB_SEGSIZE slots), which is private
  again when the I/O is done;
- pools are added for good, each of 1 to 4 MiB (IO_TLB_MIN_SLABS to the largest block of the buddy allocator).

`count` is the number of conversions after boot. Assumptions: all memory was touched; one new pool for each 500
conversions, at most 32 of them; 32 transient pools in flight, and they end in any order; three of four lie where one
was freed lately, as the per-CPU lists make likely, the others anywhere. The guest ends as kexec does: everything is
taken back (x86_platform.guest.enc_kexec_finish).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from guestmem.simulate.generators.guest import (
    LOW_MEMORY,
    create,
    share,
    share_in_pieces,
    touch,
    unshare,
    unshare_in_pieces,
)
from guestmem.simulate.source import Replayable

_MIB = 256
_LEAST, _MOST = 64 * _MIB, 1024 * _MIB
_SEGMENT = 64
_IN_FLIGHT = 32
_POOL_EVERY, _POOLS = 500, 32
_REUSED = 0.75


def region(pages: int) -> tuple[int, int]:
    """Where the buffer of a guest with so many pages lies."""
    size = min(max(pages * 6 // 100, _LEAST), _MOST) // 512 * 512
    end = min(pages, LOW_MEMORY) // 512 * 512
    return end - size, end


def events(pages: int, seed: int, count: int) -> Iterator[Replayable]:
    rng = random.Random(seed)
    first, last = region(pages)
    yield create(pages)
    yield from touch(0, pages)
    yield from share_in_pieces(first, last)
    places = _Places(rng, pages, (first, last))
    transient: list[tuple[int, int]] = []
    pools: list[tuple[int, int]] = []
    for done in range(count):
        if done % _POOL_EVERY == _POOL_EVERY - 1 and len(pools) < _POOLS:
            pool = places.take(rng.choice((256, 512, 1024)))
            pools.append(pool)
            yield from share(*pool)
        elif len(transient) >= _IN_FLIGHT or (transient and rng.random() < 0.5):
            pool = transient.pop(rng.randrange(len(transient)))
            places.give(pool)
            yield from unshare(*pool)
        else:
            pool = places.take(1 << rng.randrange(_SEGMENT.bit_length()))
            transient.append(pool)
            yield from share(*pool)
    for pool in (*transient, *pools):
        yield from unshare(*pool)
    yield from unshare_in_pieces(first, last)


class _Places:
    """Naturally aligned blocks of memory outside of `taken`, the last freed first."""

    def __init__(self, rng: random.Random, pages: int, taken: tuple[int, int]) -> None:
        self._rng = rng
        self._pages = pages
        self._busy = [taken]
        self._freed: list[tuple[int, int]] = []

    def take(self, size: int) -> tuple[int, int]:
        fitting = [place for place in self._freed[-_IN_FLIGHT:] if place[1] - place[0] >= size]
        if fitting and self._rng.random() < _REUSED:
            place = fitting[-1]
            self._freed.remove(place)
            place = (place[0], place[0] + size)
        else:
            place = self._fresh(size)
        self._busy.append(place)
        return place

    def give(self, place: tuple[int, int]) -> None:
        self._busy.remove(place)
        self._freed = [*self._freed[-_IN_FLIGHT:], place]

    def _fresh(self, size: int) -> tuple[int, int]:
        while True:
            start = self._rng.randrange(self._pages // size) * size
            near = (*self._busy, *self._freed)
            if all(start + size <= first or last <= start for first, last in near):
                return start, start + size
