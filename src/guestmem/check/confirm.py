"""Confirm: a schedule that was found with scripted guests, replayed with guests of machine code on the Unicorn CPU.

A guest of machine code (`compiled`) makes exactly the accesses of its script, so the schedule fits as it is. What is
confirmed is that the same property breaks when a CPU with its own TLB and instruction stream stands where the list of
accesses stood.
"""

from __future__ import annotations

from guestmem.check.choices import Schedule
from guestmem.check.compiled import CompiledEngine, Unconfirmable
from guestmem.check.machine import Machine
from guestmem.check.run import Nondeterminism
from guestmem.check.scenario import Scenario
from guestmem.check.witness import Story, tell


def confirm(scenario: Scenario, schedule: Schedule, scripted: Story) -> str:
    """Replay on the Unicorn CPU; a sentence that says what came of it."""
    try:
        if not any(isinstance(engine, CompiledEngine) for engine in _engines(scenario)):
            return "confirm: no guest in this scenario; the Unicorn CPU has nothing to do"
        with _unicorn_guests():
            real = tell(scenario, schedule)
    except Unconfirmable as why:
        return f"confirm: not possible, {why}"
    except Nondeterminism as why:
        return f"NOT confirmed: on the Unicorn CPU the schedule cannot be followed, {why}"
    if real.property == scripted.property and len(real.steps) == len(scripted.steps):
        return f"confirmed: {real.property} breaks in the same step with the guests on the Unicorn CPU"
    return f"NOT confirmed: on the Unicorn CPU the schedule gives {real.property or 'no violation'}: {real.facts}"


def _engines(scenario: Scenario) -> list[object]:
    """The engines of a machine of the scenario, made by Unicorn."""
    with _unicorn_guests():
        machine = scenario.build()
        assert isinstance(machine, Machine)
        engines: list[object] = [vcpu.engine for kvm in machine.vms for vcpu in kvm.vcpus.values()]
        machine.forget()
    return engines


class _unicorn_guests:  # noqa: N801
    """While it is entered, machines make their guests with CompiledEngine."""

    def __enter__(self) -> None:
        self._before = Machine.script_engine
        Machine.script_engine = CompiledEngine

    def __exit__(self, *exception: object) -> None:
        Machine.script_engine = self._before
