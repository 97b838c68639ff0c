"""Translated code stays true to guest memory, whoever writes it.

Unicorn sees what its own guest writes over code, and keys translations by host page, so a page that is mapped elsewhere
is other code. It does not see the host, nor another engine. So the content of each page that the guest fetches from is
remembered and compared: when the page is fetched again after a TLB flush, always; at the start of a run, for as long as
the guest has fetched from at most LIVE_MAX pages since the flush (0.3 us for each).

The limit that remains: a guest that executes from more pages sees code that the host rewrote under it only after
`flush_tlb`. Hardware has a limit of the same kind (Intel SDM vol. 3, 9.1.3 "Handling self- and cross-modifying code").
"""

from __future__ import annotations

LIVE_MAX = 4
KNOWN_MAX = 1 << 12
"""Pages that are remembered, 16 MiB; beyond, everything is translated again."""


class CodeWatch:
    """The pages that hold translated code. A page is known by the host address of its first byte."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self._live: dict[int, memoryview[int]] = {}

    def fetched(self, hva: int, page: memoryview[int]) -> bool:
        """The guest is about to execute from `page`. False if its translation may be of other bytes."""
        content = bytes(page)
        if len(self._known) >= KNOWN_MAX and hva not in self._known:
            return False
        if self._known.setdefault(hva, content) != content:
            return False
        self._live[hva] = page
        return True

    def unchanged(self) -> bool:
        """Whether what was executed before this run may be executed again."""
        live = self._live
        if len(live) > LIVE_MAX:
            return True
        known = self._known
        for hva, page in live.items():  # noqa: SIM110 - all() takes twice as long, once a run
            if bytes(page) != known[hva]:
                return False
        return True

    def run_ended(self) -> None:
        """What the guest itself wrote, Unicorn has seen."""
        if len(self._live) <= LIVE_MAX:
            for hva, page in self._live.items():
                self._known[hva] = bytes(page)

    def tlb_flushed(self) -> None:
        """Each page will be fetched again."""
        self._live.clear()

    def code_flushed(self) -> None:
        """Nothing is translated any more. Only together with a TLB flush."""
        self._known.clear()
        self._live.clear()
