"""The search itself: verdicts, bounds, what counts as a violation, and that strategies agree."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from guestmem.check.explore import EXHAUSTED, LIMIT, VIOLATED, Limits, explore
from guestmem.check.reference import reference
from guestmem.check.scenario import built_in
from guestmem.check.strategies import STRATEGIES
from guestmem.check.strategies.best import Best
from guestmem.check.strategies.dfs import Dfs
from guestmem.check.strategies.pct import Pct
from guestmem.check.strategies.portfolio import Portfolio
from guestmem.check.strategies.random_walk import RandomWalk
from guestmem.check.strategies.replay import Replay
from guestmem.check.strategies.states import States
from guestmem.check.strategies.strategy import Strategy
from guestmem.sched import WaitQueue
from tests.check.toys import Toy, toy

Calls = dict[str, Coroutine[Any, Any, object]]
SAMPLERS = [RandomWalk, Pct]


def lost_update(world: Toy) -> Calls:
    """Two increments that may lose one another."""

    async def increment() -> int:
        read: int = world.shared.get("total", 0)
        await world.scheduler.preempt("between load and store")
        world.shared["total"] = read + 1
        return read + 1

    return {"a": increment(), "b": increment()}


def late_bug(world: Toy) -> Calls:
    """Broken only if b runs as a whole between two points of a."""

    async def a() -> None:
        await world.scheduler.preempt("one")
        world.shared["in"] = True
        await world.scheduler.preempt("two")
        world.shared["in"] = False

    async def b() -> None:
        await world.scheduler.preempt("three")
        world.shared["broken"] = world.shared.get("in", False)

    return {"a": a(), "b": b()}


def test_every_strategy_that_exhausts_finds_the_same_outcomes() -> None:
    every: list[Strategy] = [Dfs(), States(), Best(), Portfolio()]
    for scenario in (toy(lost_update), reference(3, 3, 4), reference(2, 5, 2)):
        results = [explore(scenario, type(strategy)()) for strategy in every]
        assert {result.verdict for result in results} == {EXHAUSTED}
        assert len({result.answers for result in results}) == 1
        assert results[1].executions < results[0].executions


@pytest.mark.parametrize(
    "name",
    ["convert_against_pin", "two_binds_of_one_page", "mmap_against_last_close", "convert_range_with_one_pin",
     "slot_delete_against_last_close", "stubborn_user", "populate_against_punch"],
)  # fmt: skip
def test_pruned_and_plain_search_agree_on_the_product(name: str) -> None:
    """Were a state's fingerprint too coarse, the pruned search would miss an answer."""
    scenario = built_in()[name]
    plain, pruned = explore(scenario, Dfs()), explore(scenario, States())
    assert plain.verdict == pruned.verdict == EXHAUSTED
    assert plain.answers == pruned.answers


def test_the_number_of_schedules_is_what_combinatorics_says() -> None:
    assert explore(reference(2, 3, 4), Dfs()).executions == 20  # 6! / (3! 3!)
    assert explore(reference(3, 4, 4), Dfs()).executions == 34_650  # 12! / (4! 4! 4!)


def test_a_bound_on_preemptions_leaves_schedules_out_and_grows_to_all() -> None:
    by_bound = [explore(reference(2, 4, 4), Dfs(bound)).executions for bound in range(9)]
    assert by_bound[0] == 2  # who goes first
    assert by_bound == sorted(by_bound)
    assert by_bound[-1] == explore(reference(2, 4, 4), Dfs()).executions == 70
    for bound in range(4):
        assert explore(toy(late_bug), Dfs(bound)).verdict == explore(toy(late_bug), States(bound)).verdict
    assert explore(toy(late_bug), States(0)).verdict == EXHAUSTED
    assert explore(toy(late_bug), States(1)).verdict == VIOLATED


def test_a_limit_is_not_a_pass() -> None:
    for strategy in (Dfs(), States(), RandomWalk(), Pct()):
        result = explore(reference(3, 10, 4), strategy, Limits(executions=50))
        assert (result.verdict, result.executions) == (LIMIT, 50)
        assert "50 executions" in result.why
    assert explore(reference(3, 10, 4), Dfs(), Limits(seconds=0.05)).verdict == LIMIT


def test_a_full_visited_set_is_a_limit_and_its_size_is_reported() -> None:
    result = explore(reference(3, 10, 4), States(max_states=100))
    assert result.verdict == LIMIT
    assert "full with 100 states" in result.why
    assert result.states == 100
    assert result.memory_bytes > 100 * 16


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_finds_the_late_bug(name: str) -> None:
    result = explore(toy(late_bug), STRATEGIES[name](None, 7), Limits(executions=500))
    assert (result.verdict, result.property) == (VIOLATED, "S1")
    assert result.schedule is not None
    again = explore(toy(late_bug), Replay(result.schedule.choices))
    assert (again.verdict, again.property, again.schedule) == (VIOLATED, "S1", result.schedule)


def test_the_best_schedule_is_the_simplest() -> None:
    result = explore(toy(late_bug), Best())
    assert result.schedule is not None
    assert result.schedule.token() in ("a2b2", "ba2b")  # either way one preemption and four steps
    assert explore(toy(late_bug), Dfs()).schedule != result.schedule or result.schedule.steps == 4


def test_the_same_seed_walks_the_same_way() -> None:
    def walk(sampler: type[RandomWalk] | type[Pct], seed: int) -> frozenset[str]:
        return explore(reference(3, 10, 2), sampler(seed), Limits(executions=5)).answers

    for sampler in SAMPLERS:
        assert walk(sampler, 1) == walk(sampler, 1)
        assert walk(sampler, 1) != walk(sampler, 2)


def test_a_scenario_that_depends_on_something_else_is_reported() -> None:
    runs = [0]

    def fickle(world: Toy) -> Calls:
        runs[0] += 1
        number = runs[0]

        async def act() -> None:
            world.shared["run"] = number
            await world.scheduler.preempt("once")

        return {"a": act(), "b": act()}

    assert explore(toy(fickle), States()).property == "nondeterminism"
    assert explore(toy(fickle), Dfs()).property == "nondeterminism"


def test_a_schedule_of_another_scenario_does_not_fit() -> None:
    result = explore(toy(late_bug), Replay(b"\0" * 9 + b"\7"))
    assert (result.verdict, result.property) == (VIOLATED, "nondeterminism")


def test_what_never_happens_although_it_should_is_a_violation() -> None:
    assert explore(toy(lost_update, sometimes=frozenset({"a: 1", "a: 2", "b: 2"})), States()).verdict == EXHAUSTED
    vacuous = explore(toy(lost_update, sometimes=frozenset({"a: 1", "a: 3"})), States())
    assert (vacuous.verdict, vacuous.property, vacuous.never_seen) == (VIOLATED, "sometimes", ("a: 3",))
    limited = explore(toy(lost_update, sometimes=frozenset({"a: 3"})), RandomWalk(), Limits(executions=5))
    assert (limited.verdict, limited.never_seen) == (LIMIT, ("a: 3",))


def test_an_answer_that_must_not_be_is_a_violation() -> None:
    result = explore(toy(lost_update, never=frozenset({"b: 1"})), States())
    assert (result.verdict, result.property) == (VIOLATED, "never")


def test_failures_are_choices_and_bounded() -> None:
    def fallible(world: Toy) -> Calls:
        async def act() -> str:
            return "".join(str(int(world.scheduler.fails(f"step {step}"))) for step in range(3))

        return {"a": act()}

    for failures, answers in ((0, {"000"}), (1, {"000", "100", "010", "001"})):
        result = explore(toy(fallible, failures=failures), States())
        assert result.answers == {f"a: {answer}" for answer in answers}
    assert len(explore(toy(fallible, failures=3), Dfs()).answers) == 8


def test_a_deadlock_is_l5() -> None:
    def abba(world: Toy) -> Calls:
        queues = {name: WaitQueue(world.scheduler, name) for name in ("one", "other")}

        async def wait(mine: str, other: str) -> None:
            await queues[mine].wait_until(lambda: bool(world.shared.get(mine)))
            world.shared[other] = True
            queues[other].wake_all()

        return {"a": wait("one", "other"), "b": wait("other", "one")}

    result = explore(toy(abba), States())
    assert (result.verdict, result.property) == (VIOLATED, "L5")


def test_a_loop_that_others_can_end_is_no_livelock() -> None:
    def spinner(world: Toy) -> Calls:
        async def look() -> None:
            while not world.shared.get("done"):
                await world.scheduler.cond_resched("look again")

        async def end() -> None:
            await world.scheduler.preempt("before")
            world.shared["done"] = True

        return {"look": look(), "end": end()}

    assert explore(toy(spinner), States()).verdict == EXHAUSTED


def test_a_loop_that_a_fair_scheduler_cannot_leave_is_one() -> None:
    def two_spinners(world: Toy) -> Calls:
        async def spin(mine: str) -> None:
            while not world.shared.get("done"):
                await world.scheduler.cond_resched(mine)

        return {"a": spin("a"), "b": spin("b")}

    result = explore(toy(two_spinners), States())
    assert result.verdict == VIOLATED
    assert result.schedule is not None
    assert set(result.schedule.cycle) == {0, 1}, "both run on the way round"
    sampled = explore(toy(two_spinners), RandomWalk(), Limits(executions=3, steps=50))
    assert (sampled.verdict, sampled.property) == (VIOLATED, result.property)


def test_executions_leave_no_tasks_behind(recwarn: pytest.WarningsRecorder) -> None:
    explore(built_in()["close_everything"], States(), Limits(executions=50))
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]
