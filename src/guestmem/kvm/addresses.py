"""Addresses of a guest."""

from __future__ import annotations

from typing import NewType

from guestmem.memory import PAGE_SHIFT

Gpa = NewType("Gpa", int)
"""A guest physical byte address."""
Gfn = NewType("Gfn", int)
"""A guest frame number: gpa >> 12."""


def gfn_of(gpa: int) -> Gfn:
    """The frame that holds a guest physical address."""
    return Gfn(gpa >> PAGE_SHIFT)


def gpa_of(gfn: int) -> Gpa:
    """The first byte of a frame."""
    return Gpa(gfn << PAGE_SHIFT)
