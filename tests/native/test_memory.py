"""Mappings of guest_memfds."""

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
    "maps",
    "raw",
]


@pytest.mark.parametrize("name", _MEMORY)
def test_memory(run: Run, name: str) -> None:
    run("memory", name)
