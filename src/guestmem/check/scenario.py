"""Scenario: a small race with a name. A file each below `guestmem.check.scenarios`, or anywhere.

    @scenario(sometimes={"host: ok", "host: SIGBUS"})
    def convert_against_host_write(m: Machine) -> None:
        gmem = m.gmem()
        m.actor("host", m.write(gmem.mmap(), b"h"))
        m.actor("convert", m.convert(gmem, Access.PRIVATE))

The function sets a machine up and names its actors; it runs once for every execution, so it must do the same each time.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from guestmem.sched import Policy, Scheduler, Task
from guestmem.uapi.levels import FUTURE, AbiLevel


class World(Protocol):
    """What an execution runs in; a Machine is one."""

    scheduler: Scheduler
    failures_left: int
    answers: dict[str, tuple[str, ...]]

    def start(self, policy: Policy) -> list[Task[Any]]:
        """Park the actors and let `policy` decide from now on."""
        ...

    def digest(self) -> bytes: ...

    def check_state(self) -> None:
        """Raises: Violation."""
        ...

    def check_end(self) -> None:
        """Raises: Violation."""
        ...

    def forget(self) -> None:
        """Give back what the execution holds, wherever it stands."""
        ...


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`build` makes the world of one execution; by keyword it takes what else than usual a Machine is to be made with.

    `sometimes` are answers ("actor: answer") each of which some execution must give, or the scenario proves nothing;
    `never` those that none may give. `preemptions` bounds how often a task that could go on is interrupted, None not at
    all; `failures` how many fallible steps fail.
    """

    name: str
    build: Callable[..., World]
    summary: str = ""
    sometimes: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    preemptions: int | None = None
    failures: int = 0

    @property
    def bound(self) -> str:
        """The bound within which `exhausted` is meant, in words."""
        schedules = "every schedule" if self.preemptions is None else f"preemptions <= {self.preemptions}"
        return schedules + (f", failures <= {self.failures}" if self.failures else "")


def scenario(
    *,
    sometimes: Iterable[str] = (),
    never: Iterable[str] = (),
    preemptions: int | None = None,
    failures: int = 0,
    level: AbiLevel = FUTURE,
) -> Callable[[Callable[[Any], None]], Scenario]:
    """Make a scenario of a function that sets a Machine up. Its first docstring line is the summary."""
    from guestmem.check.machine import Machine

    def decorate(set_up: Callable[[Any], None]) -> Scenario:
        def build(new: Callable[..., Any] = Machine, **changed: Any) -> World:
            machine = new(**{"level": level, "failures": failures, **changed})
            set_up(machine)
            return cast(World, machine)

        summary = (inspect.getdoc(set_up) or "").split("\n", 1)[0]
        return Scenario(set_up.__name__, build, summary, frozenset(sometimes), frozenset(never), preemptions, failures)

    return decorate


def built_in() -> dict[str, Scenario]:
    """The scenarios that come with guestmem, by name."""
    from guestmem.check import scenarios

    found: dict[str, Scenario] = {}
    for module in pkgutil.walk_packages(scenarios.__path__, f"{scenarios.__name__}."):
        found |= in_module(importlib.import_module(module.name))
    return found


def in_module(module: ModuleType) -> dict[str, Scenario]:
    return {value.name: value for value in vars(module).values() if isinstance(value, Scenario)}


def load_file(path: Path) -> ModuleType:
    """Import a Python file that is in no package. Raises: OSError, SyntaxError."""
    name = f"guestmem_file_{abs(hash(str(path.resolve()))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def find(name: str) -> list[Scenario]:
    """By name, or all of a file's. Raises: LookupError."""
    if name.endswith(".py"):
        found = list(in_module(load_file(Path(name))).values())
        if not found:
            raise LookupError(f"no scenario in {name}")
        return found
    scenarios = built_in()
    if name not in scenarios:
        raise LookupError(f"no scenario {name!r}")
    return [scenarios[name]]
