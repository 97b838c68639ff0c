"""The engine of a vCPU unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from guestmem.cpu.engine import Engine, GuestMemory

EngineFactory: TypeAlias = Callable[[GuestMemory], Engine]


def default_engine(memory: GuestMemory) -> Engine:
    """Unicorn."""
    from guestmem.cpu.unicorn import UnicornEngine  # not needed by who brings another engine

    return UnicornEngine(memory)
