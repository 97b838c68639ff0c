"""Footprint: what a step reads and writes of the shared state; two steps commute if neither writes what the other uses.

Nothing in the product says so. While a `Recorder` is installed the classes of the product tell it of every attribute
that is read or set, from outside. A container counts as written if it has other members at the end of the step than at
its first use in it. Page ranges are finer: bitmaps of pages, access attributes, page tables and bytes of memory are
noted by range, so steps on disjoint pages commute although they go through one object.

Objects that the scenario set up are known by the order in which a walk meets them, those that came later by the task
that made them: names that are the same in every execution with the same past of that task.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyroaring import BitMap, BitMap64

from guestmem.check.arena import ArenaBacking
from guestmem.check.canonical import LEFT_OUT
from guestmem.check.firmware import Firmware
from guestmem.cpu.scripted import Load, ScriptedEngine, Store, Write
from guestmem.memory import Range
from guestmem.memory.attributes import Attributes
from guestmem.memory.page_table import PageTable
from guestmem.sched import Scheduler, Task

_ROOMS = ("memory", "kvm", "userspace", "iommu", "sched", "arch")
_EVERYTHING = (0, 1 << 64)
_FAILURES = ("the failures that are left", "")
_UNKNOWN = ("a world that is not looked into", "")


Footprint = dict[tuple[object, str], tuple[list[tuple[int, int]], list[tuple[int, int]]]]
"""(owner, attribute) -> ranges read, ranges written."""


def conflict(ours: Footprint, theirs: Footprint) -> bool:
    """Whether the order of two steps may matter."""
    if len(theirs) < len(ours):
        ours, theirs = theirs, ours
    for key, (reads, writes) in ours.items():
        other = theirs.get(key)
        if other is not None and (_meet(writes, other[0]) or _meet(writes, other[1]) or _meet(reads, other[1])):
            return True
    return False


def _meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(start < end_ and start_ < end for start, end in some for start_, end_ in others)


class Recorder:
    """Notes the footprint of one step at a time. `install` it around a search."""

    def __init__(self) -> None:
        self.active = False
        self._footprint: Footprint = {}
        self._before: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._names: dict[int, object] = {}
        self._kept: list[object] = []
        self._task = ""
        self._made: dict[str, int] = {}

    def begin_execution(self, roots: list[object]) -> None:
        """Name what is there."""
        self._names.clear()
        self._kept.clear()
        self._made.clear()
        todo = list(roots)
        while todo:
            value = todo.pop()
            if isinstance(value, list | tuple | set | frozenset):
                todo += value
            elif isinstance(value, dict):
                todo += [*value.keys(), *value.values()]
            elif id(value) not in self._names and _is_ours(type(value)):
                self._name(value, len(self._names))
                todo += [_get(value, name) for name in sorted(_stored(value)) if _has(value, name)]

    def begin_step(self, task: str) -> None:
        self._task = task
        self._footprint = {}
        self._before.clear()

    def watched(self, send: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A task's `send` that is noted: what others do between two steps, to look at the state, is not."""

        def noted(value: Any) -> Any:
            self.active = True
            try:
                return send(value)
            finally:
                self.active = False

        return noted

    def end_step(self) -> Footprint:
        """What the step used."""
        for (_, name), (owner, before) in self._before.items():
            now = _frozen(_get(owner, name)) if _has(owner, name) else None
            self._note(owner, name, *_EVERYTHING, write=now != before)
        return self._footprint

    def used(self, owner: Any, name: str) -> None:
        """An attribute is read, or about to be set."""
        key = (id(owner), name)
        if key not in self._before:
            self._before[key] = (owner, _frozen(_get(owner, name)) if _has(owner, name) else None)

    def used_range(self, owner: object, name: str, start: int, end: int, write: bool) -> None:
        if self.active:
            self._note(owner, name, start, end, write=write)

    def may_fail(self) -> None:
        """A fallible step asks: failures are scarce, so those who ask depend on each other."""
        self._footprint[_FAILURES] = ([], [_EVERYTHING])

    def cannot_see(self) -> None:
        """The world is not the product's: whatever a step does may depend on any other."""
        self._footprint[_UNKNOWN] = ([], [_EVERYTHING])

    def _note(self, owner: object, name: str, start: int, end: int, *, write: bool) -> None:
        known_as = self._names.get(id(owner))
        if known_as is None:
            number = self._made[self._task] = self._made.get(self._task, 0) + 1
            known_as = self._name(owner, (self._task, type(owner).__name__, number))
        uses = self._footprint.setdefault((known_as, name), ([], []))[write]
        if (start, end) not in uses:
            uses.append((start, end))

    def _name(self, owner: object, name: object) -> object:
        self._names[id(owner)] = name
        self._kept.append(owner)
        return name

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts the product's classes tell this recorder."""
        undo: list[tuple[Any, str, Any]] = []

        def put(owner: Any, name: str, value: Any) -> None:
            undo.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, value)

        for kind in _classes():
            put(kind, "__getattribute__", _reading(self, kind))
            put(kind, "__setattr__", _setting(self))
        for place, name, value in _ranged(self):
            put(place, name, value)
        try:
            yield
        finally:
            for owner, name, value in reversed(undo):
                if value is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


class _Pages:
    """A bitmap of pages that notes which of them are asked for and changed."""

    __slots__ = ("_bits", "_name", "_owner", "_recorder")

    def __init__(self, recorder: Recorder, owner: object, name: str, bits: Any) -> None:
        self._recorder, self._owner, self._name, self._bits = recorder, owner, name, bits

    def _use(self, start: int, end: int, write: bool) -> None:
        self._recorder.used_range(self._owner, self._name, start, end, write)

    def _use_all(self, write: bool) -> None:
        self._recorder.used_range(self._owner, self._name, *_EVERYTHING, write=write)

    def __contains__(self, page: int) -> bool:
        self._use(page, page + 1, False)
        return page in self._bits

    def contains_range(self, start: int, end: int) -> bool:
        self._use(start, end, False)
        return bool(self._bits.contains_range(start, end))

    def range_cardinality(self, start: int, end: int) -> int:
        self._use(start, end, False)
        return int(self._bits.range_cardinality(start, end))

    def add_range(self, start: int, end: int) -> None:
        self._use(start, end, True)
        self._bits.add_range(start, end)

    def remove_range(self, start: int, end: int) -> None:
        self._use(start, end, True)
        self._bits.remove_range(start, end)

    def __bool__(self) -> bool:
        self._use_all(write=False)
        return bool(self._bits)

    def __len__(self) -> int:
        self._use_all(write=False)
        return len(self._bits)

    def __iter__(self) -> Iterator[int]:
        self._use_all(write=False)
        return iter(self._bits)

    def __getattr__(self, name: str) -> Any:
        self._use_all(write=name not in ("max", "min", "next_set_bit", "isdisjoint"))
        return getattr(self._bits, name)


def _reading(recorder: Recorder, kind: type) -> Any:
    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not recorder.active or name[:2] == "__" or name in _left_out(type(self)) or name not in _stored(self):
            return value
        if isinstance(value, BitMap64 | BitMap):
            return _Pages(recorder, self, name, value)
        if type(self) not in _BY_RANGE:
            recorder.used(self, name)
        return value

    return read


def _setting(recorder: Recorder) -> Any:
    def store(self: Any, name: str, value: Any) -> None:
        if recorder.active and name not in _left_out(type(self)):
            recorder.used(self, name)
        object.__setattr__(self, name, value)

    return store


_BY_RANGE = frozenset((Attributes, PageTable))
"""Classes whose methods are noted by range, and not their attributes."""


def _ranged(recorder: Recorder) -> Iterator[tuple[Any, str, Any]]:
    """(place, name, replacement) of what is noted by range."""

    def method(kind: Any, name: str, span: Any, write: bool) -> tuple[Any, str, Any]:
        original = kind.__dict__[name]

        def noted(self: Any, *arguments: Any) -> Any:
            start, end = span(*arguments)
            recorder.used_range(self, "range", start, end, write)
            return original(self, *arguments)

        return kind, name, noted

    def one(number: int, *_: Any) -> tuple[int, int]:
        return number, number + 1

    def many(numbers: Range[Any], *_: Any) -> tuple[int, int]:
        return numbers.start, numbers.end

    yield method(Attributes, "get", one, False)
    yield method(Attributes, "is_all", many, False)
    yield method(Attributes, "set", many, True)
    yield method(PageTable, "lookup", one, False)
    yield method(
        PageTable, "map", lambda number, order, _: (number >> order << order, (number >> order) + 1 << order), True
    )
    yield method(PageTable, "zap", many, True)
    yield method(ArenaBacking, "free", many, True)
    yield method(ArenaBacking, "zero", many, True)
    yield ScriptedEngine, "run", _noted_access(recorder)
    for name, write in (("read_host", False), ("write_host", True)):
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[:2] in (["guestmem", room] for room in _ROOMS) and name in vars(module):
                yield module, name, _noted_copy(recorder, vars(module)[name], write)


def _noted_access(recorder: Recorder) -> Any:
    original = ScriptedEngine.run

    def run(self: ScriptedEngine) -> Any:
        stop = original(self)
        access = self.script[self.done - 1] if self.done else None
        if isinstance(access, Load | Store | Write):
            place = self.tlb.get((access.gpa >> 12, access.private))
            if place is not None:
                recorder.used_range(recorder, "bytes", place.hva, place.hva + 4096, not isinstance(access, Load))
        recorder.used_range(self, "tlb", *_EVERYTHING, write=True)
        return stop

    return run


def _noted_copy(recorder: Recorder, original: Any, write: bool) -> Any:
    def copy(hva: int, what: Any) -> Any:
        size = len(what) if write else what
        recorder.used_range(recorder, "bytes", hva, hva + size, write)
        return original(hva, what)

    return copy


_known_slots: dict[type, frozenset[str]] = {}


def _stored(value: Any) -> set[str] | frozenset[str]:
    kind = type(value)
    slots = _known_slots.get(kind)
    if slots is None:
        names: set[str] = set()
        for base in kind.__mro__:
            own = base.__dict__.get("__slots__", ())
            names.update((own,) if isinstance(own, str) else own)
        slots = _known_slots[kind] = frozenset(names - {"__weakref__", "__dict__"})
    try:
        return slots | set(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return slots


def _left_out(kind: type) -> frozenset[str]:
    return LEFT_OUT.get(kind, frozenset()) - {"owner"}


def _get(owner: Any, name: str) -> Any:
    return object.__getattribute__(owner, name)


def _has(owner: Any, name: str) -> bool:
    try:
        object.__getattribute__(owner, name)
    except AttributeError:
        return False
    return True


def _frozen(value: Any) -> Any:
    """What of a value can change in place: its members, by identity if they are objects."""
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    if isinstance(value, int | str | bytes | None | enum.Enum):
        return value
    return id(value)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("guestmem.") and not issubclass(kind, enum.Enum | Task | Scheduler)


def _classes() -> list[Any]:
    """The classes of the product whose attributes are shared state."""
    found: set[type] = {Firmware}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[:2] not in (["guestmem", room] for room in _ROOMS):
            continue
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module_name and _is_ours(kind):
                frozen = issubclass(kind, tuple | BaseException) or getattr(kind, "_is_protocol", False)
                data = getattr(kind, "__dataclass_params__", None)
                if not frozen and not (data and data.frozen):
                    found.add(kind)
    return sorted(found, key=lambda kind: kind.__qualname__)
