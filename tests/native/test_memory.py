"""Mappings of guest_memfds, memory of a VM, and its replacement under running writers."""

from __future__ import annotations

import pytest

from tests.native.conftest import Run

_MEMORY = [
    "private_page",
    "locked_page",
    "overlaid_page",
    "flags",
    "refused",
    "notices",
    "moved_in_pieces",
    "watched",
    "maps",
    "raw",
]


@pytest.mark.parametrize("name", _MEMORY)
def test_memory(run: Run, name: str) -> None:
    run("memory", name)


@pytest.mark.parametrize("name", ["writers", "system_calls", "sparse", "pieces", "file_private", "heap", "hugetlb"])
def test_replace(run: Run, name: str) -> None:
    run("replace", name)
