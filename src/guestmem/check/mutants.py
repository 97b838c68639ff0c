"""Mutants: the product with one function replaced by its buggy twin, from outside.

    @mutant("B01", replaces="guestmem.kvm.context:KvmGmemContext.unbind", breaks={"S5", "S6"})
    async def dying_file_unbind(self, slot): ...

The function is put in the original's place, as a method of its class or under every name by which a module of guestmem
knows it, and taken out again. The product has no switch for it, and the scenarios know nothing of it: a mutant is run
against all of them until one breaks.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guestmem.check.scenario import load_file

KNOWN_BUGS = Path("tests/known_bugs")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`bug` is the number in known_bugs.md, `replaces` is "module:Class.function" or "module:function", `breaks` the
    properties one of which must be seen to break."""

    name: str
    bug: str
    replaces: str
    breaks: frozenset[str]
    function: Any
    summary: str = ""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The buggy twin in the place of the original."""
        module_name, _, path = self.replaces.partition(":")
        module = importlib.import_module(module_name)
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        places = [(owner, name, inspect.getattr_static(owner, name))]
        if not owners:
            places = _places_of(places[0][2])
        for place, known_as, _ in places:
            setattr(place, known_as, self.function)
        try:
            yield
        finally:
            for place, known_as, original in places:
                setattr(place, known_as, original)


def mutant(bug: str, *, replaces: str, breaks: set[str]) -> Callable[[Any], Mutant]:
    """Make a mutant of a function. Its first docstring line says what is wrong with it."""

    def decorate(function: Any) -> Mutant:
        summary = (inspect.getdoc(function) or "").split("\n", 1)[0]
        return Mutant(function.__name__, bug, replaces, frozenset(breaks), function, summary)

    return decorate


def _places_of(function: Any) -> list[tuple[Any, str, Any]]:
    """Every name in a module of guestmem that stands for a function."""
    return [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] == "guestmem"
        for name, value in list(vars(module).items())
        if value is function
    ]


def load(path: Path) -> list[Mutant]:
    """The mutants of a file. Raises: OSError."""
    return [value for value in vars(load_file(path)).values() if isinstance(value, Mutant)]


def in_folder(folder: Path) -> list[str]:
    """FILE.py:NAME of each mutant in the files of a folder, by file name; tests are passed over."""
    files = sorted(file for file in folder.glob("[a-z]*.py") if not file.name.startswith("test_"))
    return [f"{file.resolve()}:{each.name}" for file in files for each in load(file)]


def find(name: str) -> Mutant:
    """FILE.py:NAME, or FILE.py with one mutant in it. Raises: LookupError, OSError."""
    file, _, wanted = name.rpartition(":") if ".py:" in name else (name, "", "")
    found = [each for each in load(Path(file)) if not wanted or each.name == wanted]
    if len(found) != 1:
        raise LookupError(f"{len(found)} mutants {wanted or 'without a name'} in {file}")
    return found[0]
