"""A guest of 1 TiB and 100,000 random conversions of 4 KiB, back and forth, in `guestmem simulate`.

The subject is the provider's conversion in a file of 1G or 2M pages, with splits, merges and vmemmap books; the peer
the same conversion in a file of 4K pages. Ratios are of CPU time, since the rows are not taken in turns. Every
row must end as it began.
"""

from __future__ import annotations

from bench.harness import Row, report
from guestmem.memory import Conversion, Split
from guestmem.simulate import row as answer
from guestmem.simulate.costs import default_costs
from guestmem.simulate.generators import Generated
from guestmem.simulate.run import Task, run_rows
from guestmem.simulate.sizes import ORDER_OF, size_text
from guestmem.simulate.source import survey

SOURCE = Generated("random", 1 << 40, seed=1, count=100_000)
GOAL_US, GOAL_MIB = 50, 300


def run() -> None:
    surveyed = survey(SOURCE)
    combinations = answer.combinations(
        [ORDER_OF[name] for name in ("4k", "2m", "1g")], list(Split), [Conversion.ATOMIC]
    )
    tasks = [Task(SOURCE, surveyed, each, default_costs(), 20, None, True) for each in combinations]
    peer, *subjects = run_rows(tasks, 1, lambda row, done: None)
    assert not any(row.problems for row in (peer, *subjects)), "a row did not end as it began"
    rows = []
    for subject in subjects:
        measured = subject.measured
        state = size_text(measured.state_bytes)
        shown = f"{measured.conversion_us_mean:.1f} us, {_us(subject):.1f} of it CPU; state {state}"
        rows.append(Row(subject.label, shown, f"{_us(peer):.1f} us", _us(subject) / _us(peer)))
    title = f"1 TiB, 100,000 random 4K conversions (goals: under {GOAL_US} us each, under {GOAL_MIB} MiB)"
    report(title, "a file of 4K pages, CPU", rows)


def _us(row: answer.Row) -> float:
    return row.measured.conversion_cpu_us_mean


if __name__ == "__main__":
    run()
