"""Sizes as people write them."""

from __future__ import annotations

import re

from guestmem.memory.pages import ORDER_1G, ORDER_2M, ORDER_4K, PAGE_SHIFT

ORDER_NAMES = {ORDER_4K: "4k", ORDER_2M: "2m", ORDER_1G: "1g"}
ORDER_OF = {name: order for order, name in ORDER_NAMES.items()}

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_SIZE = re.compile(r"(\d{1,19})([kmgtp]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes: 1T, 64G, 512MiB, 4096; None for anything else."""
    found = _SIZE.fullmatch(text.strip())
    return int(found[1]) << _UNITS[found[2].lower()] if found else None


def size_text(size: float) -> str:
    """Three digits and a unit: 1.5 GiB, 16 GiB, 320 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.3g} {unit}" if abs(size) < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


def bytes_of(pages: int) -> int:
    return pages << PAGE_SHIFT
