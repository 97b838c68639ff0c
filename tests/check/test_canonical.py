"""The rules by which states count as one are sound: held against the source, and against the states themselves."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import guestmem
from guestmem.check import canonical
from guestmem.check.canonical import CONSTANTS, FRAMES, STATISTICS
from guestmem.check.explore import NoFailures
from guestmem.check.machine import Machine
from guestmem.check.run import Run
from guestmem.check.scenario import Scenario, built_in
from guestmem.sched import Fingerprinter, Rules

SOURCE = Path(inspect.getfile(guestmem)).parent
PRODUCT = [
    ast.parse(path.read_text(), filename=str(path))
    for room in ("memory", "kvm", "userspace", "iommu", "sched")
    for path in sorted((SOURCE / room).rglob("*.py"))
]


def _stores_outside_init(kind: type, names: frozenset[str]) -> set[str]:
    """Attributes of `names` that any product code sets, other than a class's own __init__."""
    found = set()
    for module in PRODUCT:
        for function in ast.walk(module):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name == "__init__":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in names:
                    owner = function_owner(module, function)
                    if owner == kind.__name__ or not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                        found.add(f"{node.attr} in {owner}.{function.name}")
    return found


def function_owner(module: ast.Module, function: ast.AST) -> str:
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and any(inner is function for inner in ast.walk(node)):
            return node.name
    return ""


@pytest.mark.parametrize("kind", CONSTANTS, ids=lambda kind: kind.__name__)
def test_what_is_called_constant_is_set_by_init_alone(kind: type) -> None:
    own = {name for name in CONSTANTS[kind] if name not in ("pages", "order", "name", "owner", "level")}
    assert not _stores_outside_init(kind, frozenset(own))


@pytest.mark.parametrize("kind", STATISTICS, ids=lambda kind: kind.__name__)
def test_what_is_called_statistics_decides_nothing(kind: type) -> None:
    """Read in `statistics` only; counting up is no reading."""
    for module in PRODUCT:
        for function in ast.walk(module):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name == "statistics":
                continue
            counted = {
                id(inner)
                for node in ast.walk(function)
                if isinstance(node, ast.AugAssign)
                for inner in ast.walk(node.target)
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr in STATISTICS[kind] and id(node) not in counted:
                    assert isinstance(node.ctx, ast.Store), f"{node.attr} is read in {function.name}"


def test_a_noted_sequence_is_kept_only_where_the_rules_look() -> None:
    """A function that keeps a sequence number across an await, and is not in FRAMES, would make states too fine: no
    harm; but one that compares it in another way would make them too coarse. There is one place of each."""
    readers = {
        function.name
        for module in PRODUCT
        for function in ast.walk(module)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("moved_since", "_wakeups", "epoch")
    }
    assert readers == {"blocks", "wake_all", "wait_until", "synchronize", "__init__", "__enter__"}


def test_every_function_of_the_rules_exists() -> None:
    names = set()
    for module in pkgutil.walk_packages(guestmem.__path__, "guestmem."):
        if module.name.split(".")[1] in ("memory", "kvm", "userspace", "iommu", "sched", "check"):
            for function in _functions(importlib.import_module(module.name)):
                names.add(function)
    assert set(FRAMES) <= names


def _functions(module: object) -> set[str]:
    found = set()
    for value in vars(module).values():
        if inspect.isclass(value):
            found |= {inner.__qualname__ for inner in vars(value).values() if inspect.isfunction(inner)}
        elif inspect.isfunction(value):
            found.add(value.__qualname__)
    return found


RAW = Fingerprinter(Rules(left_out=canonical.LEFT_OUT))
"""Without a renaming, and with every counter as it is."""


def _raw(machine: Machine) -> bytes:
    return RAW(
        machine.inodes,
        machine.vms,
        machine.userspace,
        machine.iommu,
        machine.identities,
        machine.tasks,
        machine.answers,
        machine.failures_left,
        machine.pool,
    )


def _after(scenario: Scenario, choices: bytes) -> tuple[bytes, bytes, list[int]]:
    """(raw state, canonical state, who is ready) after `choices`."""
    run = Run(scenario, NoFailures())
    try:
        for _ in run.follow(choices):
            pass
        assert isinstance(run.world, Machine)
        return _raw(run.world), run.world.digest(), run.ready()
    finally:
        run.forget()


@pytest.mark.parametrize("name", ["punch_against_guest", "convert_against_pin", "slot_delete_against_prefault"])
def test_states_that_count_as_one_have_the_same_futures(name: str) -> None:
    """All raw states are walked; whenever two have one canonical state, each step leads both to one canonical state."""
    scenario = built_in()[name]
    futures: dict[bytes, dict[int, bytes]] = {}
    seen: set[bytes] = set()
    todo = [b""]
    while todo and len(seen) < 600:
        choices = todo.pop()
        raw, state, ready = _after(scenario, choices)
        if raw in seen:
            continue
        seen.add(raw)
        after = {number: _after(scenario, choices + bytes((number,)))[1] for number in ready}
        assert futures.setdefault(state, after) == after
        todo += [choices + bytes((number,)) for number in ready]
    assert len(futures) < len(seen) or name != "punch_against_guest", "nothing was merged: the test shows nothing"
