"""What the model of tests/test_model.py knows of memory: pages, who holds them, and what shape huge pages must have."""

from __future__ import annotations

import dataclasses

from guestmem.memory import Access, Inode, PageIndex
from guestmem.userspace import Pin


@dataclasses.dataclass(eq=False)
class Cell:
    """The content of a page, as long as somebody can see it. The model looks at one byte of it."""

    byte: int = 0


@dataclasses.dataclass(eq=False)
class Page:
    access: Access
    cell: Cell = dataclasses.field(default_factory=Cell)
    allocated: bool = False
    poisoned: bool = False


@dataclasses.dataclass
class Pinned:
    pin: Pin
    cells: list[Cell]
    pages: list[Page]


@dataclasses.dataclass
class Mapping:
    hva: int
    first: int
    pages: int


ORDERS = (2, 1, 0)
"""Huge pages of 4 pages, which split into 2 and then into 1: small enough to look at every page after every call."""


def check_shape(inode: Inode, pages: list[Page]) -> None:
    """Folios are as large as they can be: shared pages alone, private blocks whole unless memory in them went bad."""
    for number, page in enumerate(pages):
        if not page.allocated:
            continue
        order = inode.folios.order_of(PageIndex(number))
        if page.access is Access.SHARED:
            assert order == 0, "S13"
            continue
        for larger in (candidate for candidate in ORDERS if candidate <= inode.order):
            block = pages[number >> larger << larger : (number >> larger << larger) + (1 << larger)]
            if any(other.poisoned for other in block):
                continue
            if all(other.access is Access.PRIVATE for other in block):
                assert order >= larger, f"page {number} could be in a folio of order {larger}"
            else:
                assert order < larger, "S13"
