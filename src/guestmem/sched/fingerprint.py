"""A value that is equal for equal states: what an exploring policy prunes visited states by.

`fingerprint(*roots)` walks everything that can be reached from the roots, shared state and tasks alike, and returns a
nested tuple. Objects are numbered in the order in which the walk meets them, so two runs that reach the same state
over other heap addresses agree. A task counts as the code position and the locals of each coroutine on its chain. What
is not state (an address of the host, who listens to the trace) is left out by the class itself: `__fingerprint__`
returns what stands for an object.

What it cannot see: the evaluation stack of a suspended frame, for example how far a `for` loop's iterator has come.
Product code keeps to loop variables that tell, which every loop over users, slots or pages does.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Hashable, Iterator
from typing import Any

from pyroaring import BitMap64

from guestmem.sched.scheduler import Scheduler, Task

_ATOMS = (int, str, bytes, float, type(None), enum.Enum)
_OPAQUE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type, types.ModuleType)


def fingerprint(*roots: object) -> Hashable:
    """A hashable value that tells states apart: equal when the states reached from `roots` are."""
    seen: dict[int, int] = {}
    alive: list[object] = []  # keeps ids unique during the walk

    def walk(value: Any) -> Hashable:
        if isinstance(value, _ATOMS):
            return value
        if isinstance(value, _OPAQUE):
            return getattr(value, "__qualname__", str(type(value)))
        number = seen.get(id(value))
        if number is not None:
            return ("seen", number)
        seen[id(value)] = len(seen)
        alive.append(value)
        return (type(value).__name__, *parts(value))

    def parts(value: Any) -> Iterator[Hashable]:
        if hasattr(value, "__fingerprint__"):
            yield walk(value.__fingerprint__())
        elif isinstance(value, (list, tuple)):
            yield from map(walk, value)
        elif isinstance(value, (set, frozenset, BitMap64)):
            yield from sorted(map(walk, value), key=repr)
        elif isinstance(value, dict):
            for key in value:
                yield (walk(key), walk(value[key]))
        elif isinstance(value, bytearray):
            yield bytes(value)
        elif isinstance(value, Task):
            yield (value.name, value.done, walk(value.held), repr(value.operation))
            yield from frames(value.coroutine)
        elif isinstance(value, Scheduler):
            return
        else:
            yield from attributes(value)

    def frames(coroutine: Any) -> Iterator[Hashable]:
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
            if frame is None:
                return
            names = sorted(frame.f_locals)
            yield (frame.f_code.co_qualname, frame.f_lasti, *((name, walk(frame.f_locals[name])) for name in names))
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)

    def attributes(value: Any) -> Iterator[Hashable]:
        for name in sorted(_attribute_names(value)):
            yield (name, walk(getattr(value, name, None)))

    return tuple(walk(root) for root in roots)


def _attribute_names(value: object) -> set[str]:
    names = set(getattr(value, "__dict__", ()))
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.update((slots,) if isinstance(slots, str) else slots)
    return names - {"__weakref__", "__dict__"}
