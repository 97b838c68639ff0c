"""Witnesses: as simple as they get, told in two columns, replayed by a token, confirmed by a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem.check import mutants, story, witness
from guestmem.check.choices import Schedule, parse
from guestmem.check.confirm import confirm
from guestmem.check.explore import VIOLATED, Limits, explore
from guestmem.check.scenario import Scenario, built_in
from guestmem.check.strategies.pct import Pct
from guestmem.check.strategies.states import States

BUGS = Path(__file__).parents[1] / "known_bugs"
SCENARIOS = built_in()


@pytest.fixture
def pinned() -> Iterator[Scenario]:
    """B24 is in: a pin can slip in between the look for references and the unmapping."""
    with mutants.find(str(BUGS / "b24_references_before_unmap.py")).installed():
        yield SCENARIOS["convert_against_pin"]


def test_shrinking_finds_the_simplest_schedule_from_any(pinned: Scenario) -> None:
    found = {
        witness.shrink(pinned, explore(pinned, strategy, Limits(executions=500)))
        for strategy in (States(), Pct(seed=1), Pct(seed=2))
    }
    assert {schedule.token() for schedule in found} == {"b3a3b"}
    assert found.pop().steps == 7


def test_the_story_tells_steps_locks_pages_and_the_property(pinned: Scenario) -> None:
    told = witness.tell(pinned, parse("b3a3b"))
    text = story.text(told)
    left, right = zip(*(line.split("|", 1) for line in text.splitlines() if "|" in line), strict=True)
    assert any("convert: lock exclusive invalidate_lock inode 1" in line for line in left)
    assert any("user_pin" in line for line in left)
    assert any("convert: invalidate_lock inode 1" in line for line in right)
    assert any("page 1.0 shared, pfn 1, mm 1, 1 ref" in line for line in right)
    assert "S1 a private page is invisible to the host" in text
    assert "page 0x0 of inode 1 is private and a pin of mm 1 has it" in text


def test_the_trace_files_hold_every_step(pinned: Scenario) -> None:
    told = witness.tell(pinned, parse("b3a3b"))
    perfetto = json.loads(story.perfetto(told))["traceEvents"]
    slices = [event for event in perfetto if event["ph"] == "X"]
    assert [event["ts"] for event in slices] == [number * 1000 for number in range(7)]
    assert {event["args"]["name"] for event in perfetto if event["name"] == "thread_name"} == {"pin", "convert"}
    steps = json.loads(story.as_json(told))
    assert (steps["schedule"], steps["property"], len(steps["steps"])) == ("b3a3b", "S1", 7)
    assert steps["steps"][5]["events"][0]["event"] == "user_pin"


def test_a_livelock_is_told_to_where_it_repeats_and_replays() -> None:
    scenario = SCENARIOS["slot_delete_against_prefault"]
    with mutants.find(str(BUGS / "b26_prefault_waits_for_deletion.py")).installed():
        result = explore(scenario, States())
        assert result.schedule is not None
        again = witness.replay(scenario, parse(result.schedule.token()))
        text = story.text(witness.tell(scenario, result.schedule))
    assert (again.verdict, again.property) == (VIOLATED, "L4")
    assert "for ever" in text
    assert witness.replay(scenario, Schedule(b"\0\0", b"\0")).verdict != VIOLATED, "the product as it is does not loop"


def test_a_schedule_of_the_product_as_it_is_breaks_nothing() -> None:
    result = witness.replay(SCENARIOS["convert_against_pin"], parse("b3a3b"))
    assert (result.verdict, result.property) == ("limit", "")


def test_a_failing_step_is_in_the_story() -> None:
    scenario = SCENARIOS["stubborn_user"]
    with mutants.find(str(BUGS / "b53_bad_page_converted.py")).installed():
        result = explore(scenario, States())
        told = witness.tell(scenario, witness.shrink(scenario, result))
    assert told.property == "S19"
    assert any(step.failed for step in told.steps)
    assert "! a fallible step fails" in story.text(told)


@pytest.mark.parametrize(
    ("name", "mutant", "broken"),
    [
        ("punch_against_guest", "b32_stale_lookup_published", "S3"),
        ("snp_convert_against_guest", "b32_stale_lookup_published", "S2"),
        ("td_convert_against_guest", "b32_stale_lookup_published", "S1"),
        ("snp_both_kinds_against_convert", "h12_asserted_kind_ignored", "L5"),
    ],
)
def test_unicorn_confirms_what_scripts_have_found(name: str, mutant: str, broken: str) -> None:
    scenario = SCENARIOS[name]
    with mutants.find(str(BUGS / f"{mutant}.py")).installed():
        schedule = witness.shrink(scenario, explore(scenario, States()))
        told = witness.tell(scenario, schedule)
        assert confirm(scenario, schedule, told).startswith(f"confirmed: {broken}")
    assert confirm(scenario, schedule, told).startswith("NOT confirmed"), "without the bug nothing breaks"


def test_a_script_that_asserts_a_kind_now_and_then_cannot_be_confirmed() -> None:
    scenario = SCENARIOS["huge_convert_against_guest"]
    told = witness.tell(scenario, Schedule(b""))
    assert confirm(scenario, Schedule(b""), told).startswith("confirm: not possible")


def test_a_scenario_without_a_guest_cannot_be_confirmed(pinned: Scenario) -> None:
    schedule = parse("b3a3b")
    assert "no guest" in confirm(pinned, schedule, witness.tell(pinned, schedule))
