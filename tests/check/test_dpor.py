"""Partial-order reduction: fewer schedules, the same answers; and steps that are said to commute do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from guestmem.check import mutants
from guestmem.check.explore import EXHAUSTED, VIOLATED, Limits, NoFailures, explore
from guestmem.check.footprint import Footprint, Recorder, conflict
from guestmem.check.run import Run
from guestmem.check.scenario import Scenario, built_in
from guestmem.check.strategies.dfs import Dfs
from guestmem.check.strategies.dpor import Dpor, _roots
from guestmem.check.strategies.states import States
from guestmem.memory import Inode
from guestmem.memory.attributes import Attributes

SCENARIOS = built_in()
BUGS = Path(__file__).parents[1] / "known_bugs"


@pytest.mark.parametrize(
    "name",
    [
        "convert_against_pin",
        "convert_against_host",
        "convert_by_ioctl",
        "create_while_memory_fails",
        "fork_against_convert",
        "slot_delete_against_prefault",
        "stubborn_user",
        "two_binds_of_one_page",
        "two_conversions",
        "user_leaves_while_told",
    ],
)
def test_every_answer_in_fewer_schedules(name: str) -> None:
    scenario = SCENARIOS[name]
    reduced, pruned = explore(scenario, Dpor()), explore(scenario, States())
    assert reduced.verdict == pruned.verdict == EXHAUSTED
    assert reduced.answers == pruned.answers
    plain = explore(scenario, Dfs(), Limits(executions=2 * reduced.executions))
    assert plain.executions > reduced.executions


def test_known_bugs_show_in_the_schedules_that_are_left() -> None:
    for bug, name, broken in (
        ("b01_dying_file_unbind", "slot_delete_against_last_close", "S6"),
        ("b24_references_before_unmap", "convert_against_pin", "S1"),
        ("b29_unregister_does_not_wait", "user_leaves_while_told", "S20"),
        ("b53_bad_page_converted", "stubborn_user", "S19"),
    ):
        with mutants.find(str(BUGS / f"{bug}.py")).installed():
            result = explore(SCENARIOS[name], Dpor())
        assert (result.verdict, result.property) == (VIOLATED, broken)


def _footprints(scenario: Scenario, choices: bytes) -> tuple[list[Footprint], bytes]:
    """What each step of a schedule uses, and the state at the end."""
    recorder = Recorder()
    run = Run(scenario, NoFailures())
    found = []
    try:
        with recorder.installed():
            recorder.begin_execution(_roots(run))
            for task in run.tasks:
                task._send = recorder.watched(task._send)
            for number in choices:
                assert number in run.ready()
                recorder.begin_step(run.tasks[number].name)
                run.step(number)
                found.append(recorder.end_step())
        return found, run.world.digest()
    finally:
        run.forget()


@pytest.mark.parametrize(
    "name", ["convert_against_host", "punch_against_pin", "two_views_of_one_inode", "close_everything"]
)
def test_steps_that_are_said_to_commute_do(name: str) -> None:
    """Two neighbours of different tasks whose footprints do not meet are swapped: the state is the same."""
    scenario = SCENARIOS[name]
    chance = random.Random(name)
    swapped = 0
    while swapped < 25:
        choices = _random_schedule(scenario, chance)
        place = chance.randrange(len(choices) - 1)
        one, other = choices[place : place + 2]
        if one == other:
            continue
        steps, state = _footprints(scenario, choices[: place + 2])
        if conflict(steps[place], steps[place + 1]):
            continue
        _, swapped_state = _footprints(scenario, choices[:place] + bytes((other, one)))
        assert swapped_state == state, (choices[: place + 2], steps[place:])
        swapped += 1


def _random_schedule(scenario: Scenario, chance: random.Random) -> bytes:
    run = Run(scenario, NoFailures())
    try:
        while ready := run.ready():
            run.step(chance.choice(ready))
        return bytes(run.choices)
    finally:
        run.forget()


def test_disjoint_pages_commute_and_overlapping_ones_do_not() -> None:
    def uses(read: tuple[int, int] | None, write: tuple[int, int] | None) -> Footprint:
        return {("pages", "range"): ([read] if read else [], [write] if write else [])}

    assert not conflict(uses(None, (0, 4)), uses(None, (4, 8)))
    assert conflict(uses(None, (0, 5)), uses((4, 8), None))
    assert not conflict(uses((0, 5), None), uses((4, 8), None))
    assert not conflict({("a", "x"): ([], [(0, 1)])}, {("b", "x"): ([], [(0, 1)])})


def test_the_product_is_as_before_when_the_search_is_over() -> None:
    before = (Inode.__getattribute__, Inode.__setattr__, Attributes.get)
    explore(SCENARIOS["convert_against_pin"], Dpor(), Limits(executions=2))
    assert (Inode.__getattribute__, Inode.__setattr__, Attributes.get) == before
    assert "__getattribute__" not in vars(Inode)
