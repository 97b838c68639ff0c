"""Addresses of a host process."""

from __future__ import annotations

from typing import NewType

from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Range

Hva = NewType("Hva", int)
"""A byte in a host process's address space."""
Vpn = NewType("Vpn", int)
"""A page of it: hva >> 12."""

TASK_SIZE = Hva((1 << 47) - PAGE_SIZE)
"""User addresses are below this (x86-64 with four levels)."""


def vpn_of(hva: int) -> Vpn | None:
    """The page that holds a user address; None for an address that is not the user's."""
    return Vpn(hva >> PAGE_SHIFT) if 0 <= hva < TASK_SIZE else None


def hva_of(vpn: int) -> Hva:
    """The first byte of a page."""
    return Hva(vpn << PAGE_SHIFT)


def vpn_range(hva: int, size: int) -> Range[Vpn]:
    """The pages that `size` bytes from `hva` touch."""
    return Range(Vpn(hva >> PAGE_SHIFT), Vpn((hva + size + PAGE_SIZE - 1) >> PAGE_SHIFT))
