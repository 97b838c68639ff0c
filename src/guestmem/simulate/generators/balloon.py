"""balloon: memory that the guest does not use goes back to the host, and comes again.

Two ways of a virtio balloon:

- free page reporting (mm/page_reporting.c): free blocks of 2 MiB, at most 32 in a batch (PAGE_REPORTING_CAPACITY); the
  VMM punches each, the guest touches it when it needs it again;
- inflation (drivers/virtio/virtio_balloon.c): single pages from the top of the guest's free lists, in arrays of at most
  256; the VMM punches each page by itself, as QEMU does.

`count` is the number of holes. Assumptions: all memory was touched; of a hundred holes 70 are reported blocks and 30
inflated pages; reported blocks come in runs of 1 to 32 side by side, inflated pages in runs of 1 to 8; reuse begins
when a quarter of memory is away and takes the oldest first. Access never changes: all stays private. At the end
everything is touched again. A hole of part of a huge page frees nothing, it only zeroes: that is what this kind shows.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator

from guestmem.simulate.generators.guest import create, punch, touch
from guestmem.simulate.source import Replayable

_BLOCK = 512
_BATCH = 32
_RUN = 8
_REPORTED, _INFLATED = 0.7, 0.3
_AWAY = 0.25


def events(pages: int, seed: int, count: int) -> Iterator[Replayable]:
    rng = random.Random(seed)
    away = _Away()
    yield create(pages)
    yield from touch(0, pages)
    while count:
        for start, end in _run(rng, pages):
            if count and away.add(start, end):
                count -= 1
                yield punch(start, end)
        while away.pages > pages * _AWAY:
            yield from touch(*away.oldest())
    while away.pages:
        yield from touch(*away.oldest())


def _run(rng: random.Random, pages: int) -> list[tuple[int, int]]:
    """What goes at once: reported blocks, or inflated pages, side by side. Runs of blocks are longer, so fewer."""
    blocks, singles = _REPORTED / (1 + _BATCH), _INFLATED / (1 + _RUN)
    number = rng.randrange(pages // _BLOCK)
    if rng.random() < blocks / (blocks + singles):
        last = min(number + rng.randint(1, _BATCH), pages // _BLOCK)
        return [(block * _BLOCK, (block + 1) * _BLOCK) for block in range(number, last)]
    first = number * _BLOCK + rng.randrange(_BLOCK - _RUN)
    return [(page, page + 1) for page in range(first, first + rng.randint(1, _RUN))]


class _Away:
    """What the host has, oldest first. `pages` is how much."""

    def __init__(self) -> None:
        self.pages = 0
        self._ranges: deque[tuple[int, int]] = deque()
        self._starts: set[int] = set()
        self._in_block: Counter[int] = Counter()

    def add(self, start: int, end: int) -> bool:
        """False if some of it is away already."""
        block = start // _BLOCK
        if start in self._starts or self._in_block[block] + (end - start) > _BLOCK:
            return False
        self._ranges.append((start, end))
        self._starts.add(start)
        self._count(block, end - start)
        return True

    def oldest(self) -> tuple[int, int]:
        start, end = self._ranges.popleft()
        self._starts.remove(start)
        self._count(start // _BLOCK, start - end)
        return start, end

    def _count(self, block: int, pages: int) -> None:
        self.pages += pages
        self._in_block[block] += pages
        if not self._in_block[block]:
            del self._in_block[block]
