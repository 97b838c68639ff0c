"""random: single pages, uniformly over all memory, shared and private again. The worst that a guest can do.

Assumptions: the guest has touched all of its memory; it touches each page after converting it. In the first half of the
conversions three of four share a new page, in the second half three of four take one back, any one of those that are
shared; so a quarter of `count` is shared at the middle and nothing at the end. An odd count is one less.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from guestmem.simulate.generators.guest import create, share, touch, unshare
from guestmem.simulate.source import Replayable

_GROWTH = 0.75


def events(pages: int, seed: int, count: int) -> Iterator[Replayable]:
    rng = random.Random(seed)
    yield create(pages)
    yield from touch(0, pages)
    count -= count % 2
    shared: list[int] = []
    members: set[int] = set()
    for done in range(count):
        likely = _GROWTH if done < count // 2 else 1 - _GROWTH
        room = len(shared) < min(count - done, pages)
        if room and (not shared or rng.random() < likely):
            page = rng.randrange(pages)
            while page in members:
                page = rng.randrange(pages)
            shared.append(page)
            members.add(page)
            yield from share(page, page + 1)
        else:
            place = rng.randrange(len(shared))
            shared[place], shared[-1] = shared[-1], shared[place]
            page = shared.pop()
            members.remove(page)
            yield from unshare(page, page + 1)
