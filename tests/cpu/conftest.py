"""A memory and an engine on it for each test, given back after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture
def engine(memory: Memory) -> Iterator[UnicornEngine]:
    engine = UnicornEngine(memory)
    yield engine
    engine.close()
