"""Huge pages on the command line: how many of each size, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from guestmem.memory import HugePolicy
from guestmem.memory.interface import Conversion, Split
from guestmem.memory.pages import ORDER_1G, ORDER_2M

SIZES = {"2M": ORDER_2M, "1G": ORDER_1G}
_SPLITS = {split.value: split for split in Split}
_CONVERSIONS = {conversion.value: conversion for conversion in Conversion}


def page_counts(text: str) -> dict[int, int]:
    """2M=512,1G=4: order to count; what is not named has none. Raises: ValueError."""
    counts = {}
    for part in filter(None, text.split(",")):
        size, _, count = part.partition("=")
        if size not in SIZES or not count.isdecimal() or SIZES[size] in counts:
            raise ValueError(f"{part!r} is not a number of huge pages, as 2M=512 or 1G=4")
        counts[SIZES[size]] = int(count)
    return counts


def policy_of(text: str) -> HugePolicy:
    """lazy or whole, atomic or stepwise, in any order; what is not named is lazy and atomic. Raises: ValueError."""
    split: Split | None = None
    conversion: Conversion | None = None
    for word in text.split(","):
        if word in _SPLITS and split is None:
            split = _SPLITS[word]
        elif word in _CONVERSIONS and conversion is None:
            conversion = _CONVERSIONS[word]
        else:
            raise ValueError(f"{text!r} is not a policy: one of lazy and whole, and one of atomic and stepwise")
    return HugePolicy(split or Split.LAZY, conversion or Conversion.ATOMIC)


def shortages(wanted: Mapping[int, int], got: Mapping[int, int]) -> Iterator[str]:
    """What to say of huge pages that this machine could not set aside."""
    for size, order in SIZES.items():
        if got.get(order, 0) < wanted.get(order, 0):
            yield f"of {wanted[order]} huge pages of {size} this machine could set aside {got[order]}"
