"""A memory and an engine on it for each test, given back after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.cpu.engine import PageBit
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import Memory
from tests.cpu.protected_guest import Guest, Start


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


@pytest.fixture
def start() -> Iterator[Start]:
    guests: list[Guest] = []

    def begin(bit: PageBit | None, code: bytes, **registers: int) -> Guest:
        guest = Guest(bit, code)
        guests.append(guest)
        guest.set(**registers)
        return guest

    yield begin
    for guest in guests:
        guest.close()
