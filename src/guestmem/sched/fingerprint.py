"""A value that is equal for equal states: what an exploring policy prunes visited states by.

`fingerprint(*roots)` walks everything that can be reached from the roots, shared state and tasks alike, and returns a
digest of 16 bytes, the same in every process. Mutable objects are numbered in the order in which the walk meets them,
so two runs that reach the same state over other heap addresses agree. A task counts as its next operation and the code
position and locals of each coroutine on its chain. What is not state (an address of the host, who listens to the trace)
is left out by the class itself, whose `__fingerprint__` returns what stands for an object, or by the `Rules` of the
caller, who may also say when two states count as one.

What it cannot see: the evaluation stack of a suspended frame, for example how far a `for` loop's iterator has come.
Product code keeps to loop variables that tell, which every loop over users, slots or pages does.

Tokens are appended to one flat list and marshalled at the end: the walk is what an explorer spends most of its time in,
and nested tuples took six times as long.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import marshal
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pyroaring import BitMap, BitMap64

from guestmem.sched.scheduler import Scheduler, Task

DIGEST_SIZE = 16
_SEEN = Ellipsis
_MARSHAL_WITHOUT_REFERENCES = 2  # later versions write an object that occurs twice in another way than two equal ones
_PLAIN: frozenset[type] = frozenset((int, str, bytes, float, bool, type(None)))
_OPAQUE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type, types.ModuleType, types.LambdaType)

Describe: TypeAlias = Callable[["Walk", Any], None]
"""Appends to `walk.out`, or walks on, what stands for a value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What a caller knows of the classes it walks.

    `describe` replaces the description of a class, `locals` that of every local variable of a name. `left_out` names
    attributes that are not state. `frames` rewrites the locals of a suspended function, by its qualified name.
    """

    describe: Mapping[type, Describe] = dataclasses.field(default_factory=dict)
    left_out: Mapping[type, frozenset[str]] = dataclasses.field(default_factory=dict)
    locals: Mapping[str, Describe] = dataclasses.field(default_factory=dict)
    frames: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = dataclasses.field(default_factory=dict)


class Fingerprinter:
    """Walks states under one set of rules; remembers how each class is walked."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.plans: dict[type, Describe] = {}

    def __call__(self, *roots: object) -> bytes:
        walk = Walk(self)
        for root in roots:
            walk.value(root)
        return walk.digest()


class Walk:
    """One walk. `out` is what it has met, `numbers` belongs to the rules (a renaming, for example)."""

    __slots__ = ("_fingerprinter", "_kept", "_passing", "_plans", "_seen", "numbers", "out")

    def __init__(self, fingerprinter: Fingerprinter) -> None:
        self.out: list[Any] = []
        self.numbers: dict[int, int] = {}
        self._fingerprinter = fingerprinter
        self._plans = fingerprinter.plans
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []
        self._passing: list[object] = []  # kept until the end, so that no id comes twice

    def digest(self) -> bytes:
        """What the walk has met so far, in 16 bytes."""
        tokens = marshal.dumps(self.out, _MARSHAL_WITHOUT_REFERENCES)
        return hashlib.blake2b(tokens, digest_size=DIGEST_SIZE).digest()

    def value(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.out.append(value)
            return
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = self._learn(kind)
        plan(self, value)

    def met(self, value: object) -> bool:
        """Whether a mutable object was met before; it is from now on."""
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._kept)
            self._kept.append(value)
            return False
        self.out.append(_SEEN)
        self.out.append(number)
        return True

    def passing(self, value: object) -> None:
        """Walk an object that only this walk holds."""
        self._passing.append(value)
        self.value(value)

    def frames(self, coroutine: Any) -> None:
        """Code position and locals of a suspended coroutine, and of what it awaits."""
        out, rules = self.out, self._fingerprinter.rules
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
            if frame is None:
                return
            name = frame.f_code.co_qualname
            out.append(name)
            out.append(frame.f_lasti)
            variables = frame.f_locals
            if name in rules.frames:
                variables = rules.frames[name](dict(variables))
            for name in sorted(variables):  # the dict remembers in which order locals were first seen by a reader
                value = variables[name]
                out.append(name)
                rules.locals.get(name, Walk.value)(self, value)
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)

    def _learn(self, kind: type) -> Describe:
        rules = self._fingerprinter.rules
        if kind in rules.describe:
            return rules.describe[kind]
        if hasattr(kind, "__fingerprint__"):
            return _by_stand_in
        for base, plan in _BY_BASE:
            if issubclass(kind, base):
                return plan
        left_out = frozenset().union(*(rules.left_out.get(base, frozenset()) for base in kind.__mro__))
        return _by_attributes(kind, left_out)


def fingerprint(*roots: object) -> bytes:
    """A digest that tells states apart: equal when the states reached from `roots` are."""
    return _DEFAULT(*roots)


def _by_stand_in(walk: Walk, value: Any) -> None:
    if walk.met(value):
        return
    walk.out.append(type(value).__name__)
    walk.passing(value.__fingerprint__())


def _opaque(walk: Walk, value: Any) -> None:
    walk.out.append(getattr(value, "__qualname__", type(value).__name__))


def _enum(walk: Walk, value: enum.Enum) -> None:
    walk.out.append(value._name_)


def _plain_subclass(walk: Walk, value: Any) -> None:
    walk.out.append(next(base for base in type(value).__mro__ if base in _PLAIN)(value))


def _tuple(walk: Walk, value: tuple[Any, ...]) -> None:
    """By value: a tuple has no identity that anybody could depend on."""
    walk.out.append(len(value))
    for item in value:
        walk.value(item)


def _list(walk: Walk, value: list[Any]) -> None:
    if walk.met(value):
        return
    walk.out.append("list")
    walk.out.append(len(value))
    for item in value:
        walk.value(item)


def _mapping(walk: Walk, value: Mapping[Any, Any]) -> None:
    """Keys that are integers in their order, others as they were put in."""
    if walk.met(value):
        return
    walk.out.append("dict")
    walk.out.append(len(value))
    if not value:
        return
    items = value.items()
    if type(next(iter(value))) is int:
        items = sorted(items)  # type: ignore[assignment]
    for key, item in items:
        walk.value(key)
        walk.value(item)


def _set(walk: Walk, value: Any) -> None:
    """Members that are integers in their order, others by their own digests."""
    out = walk.out
    out.append(len(value))
    if all(type(member) is int for member in value):
        out.extend(sorted(value))
        return
    members = []
    for member in value:
        walk.out = []
        walk.value(member)
        members.append(marshal.dumps(walk.out, _MARSHAL_WITHOUT_REFERENCES))
    walk.out = out
    out.extend(sorted(members))


def _bytearray(walk: Walk, value: bytearray) -> None:
    walk.out.append(bytes(value))


def _task(walk: Walk, task: Task[Any]) -> None:
    if walk.met(task):
        return
    out = walk.out
    out.append(task.name)
    out.append(task.done)
    out.append(task.signal_pending)
    for lock in task.held:
        walk.value(lock)
    if task.operation is not None:
        out.append(task.operation.kind)
        walk.value(task.operation.subject)
    walk.frames(task.coroutine)


def _frames(walk: Walk, coroutine: Any) -> None:
    if not walk.met(coroutine):
        walk.frames(coroutine)


def _nothing(walk: Walk, value: object) -> None:
    """Machinery: not state."""


def _by_attributes(kind: type, left_out: frozenset[str]) -> Describe:
    slots: set[str] = set()
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        slots.update((names,) if isinstance(names, str) else names)
    slots -= {"__weakref__", "__dict__"} | left_out
    ordered = sorted(slots)
    tag = kind.__name__

    def describe(walk: Walk, value: Any) -> None:
        if walk.met(value):
            return
        out, plans = walk.out, walk._plans
        out.append(tag)
        for name in ordered:
            walk.value(getattr(value, name, None))
        for name, attribute in getattr(value, "__dict__", _EMPTY).items():
            if name not in left_out:
                out.append(name)
                kind = type(attribute)
                if kind in _PLAIN:  # as Walk.value, without the call: most of a state is read here
                    out.append(attribute)
                elif kind in plans:
                    plans[kind](walk, attribute)
                else:
                    walk.value(attribute)

    return describe


_EMPTY: Mapping[str, Any] = {}
_BY_BASE: tuple[tuple[type | tuple[type, ...], Describe], ...] = (
    (enum.Enum, _enum),
    (tuple(_PLAIN - {type(None), bool}), _plain_subclass),
    (_OPAQUE, _opaque),
    (Task, _task),
    (Scheduler, _nothing),
    (tuple, _tuple),
    (list, _list),
    ((set, frozenset, BitMap64, BitMap), _set),
    (Mapping, _mapping),
    (bytearray, _bytearray),
    ((types.CoroutineType, types.GeneratorType), _frames),
)
_DEFAULT = Fingerprinter()
