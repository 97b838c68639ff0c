"""Followers: who keeps leaves of its own over a guest's pages, in the sizes that the ownership tables have.

An entry that is split or taken away must not be under a larger or a stale leaf for one step (seed.md Q13: in all tables
or none). KVM makes such changes for its own reasons and does not know an IOMMU, so the architecture passes them on. In
a kernel this would be a call made under the lock that the change itself is made under.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from guestmem.memory import Pfn

Follow: TypeAlias = Callable[[Pfn, int], None]
"""Called with the first page and the number of pages whose entry is another one now. It cannot fail."""


class Followers:
    """Those of one virtual machine."""

    def __init__(self) -> None:
        self._calls: list[Follow] = []

    def __fingerprint__(self) -> None:
        """Who follows is said by who maps the guest's pages."""

    def add(self, follow: Follow) -> None:
        self._calls.append(follow)

    def remove(self, follow: Follow) -> None:
        self._calls.remove(follow)

    def tell(self, pfn: Pfn, pages: int) -> None:
        """The entry over these pages was split, or is gone."""
        for follow in self._calls:
            follow(pfn, pages)
