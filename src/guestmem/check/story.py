"""Story: a witness for a reader. Left what happened, step by step; right the locks and pages after it, where they
changed."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import msgspec

from guestmem.check.invariants import OTHERS, PROPERTIES
from guestmem.check.witness import Step, Story
from guestmem.trace.events import Event

LEFT = 66
_QUIET = frozenset({"inode", "vm", "mm", "event"})


def text(story: Story) -> str:
    """The story in two columns."""
    lines = [f"{'what happens':<{LEFT}} | locks and pages after it", "-" * LEFT + "-+-" + "-" * 50]
    told: dict[str, str] = {}
    for place, step in enumerate(story.steps):
        if place == story.cycle_at:
            lines.append(f"{'--- from here on for ever ---':<{LEFT}} |")
        state = _by_subject(step)
        right = [line for subject, line in state.items() if told.get(subject) != line]
        right += [f"{subject}: no lock" for subject in told if subject not in state and subject in story.actors]
        told = state
        lines += _row(_left(story, step), right)
    lines.append("")
    lines.append(f"{story.property} {statement(story.property)}")
    lines += textwrap.wrap(story.facts, 116, initial_indent="   ", subsequent_indent="   ")
    return "\n".join(lines)


def _by_subject(step: Step) -> dict[str, str]:
    """Who or what each line of the right column is about, and the line."""
    locks = {lock.partition(":")[0]: lock for lock in step.locks}
    return locks | {" ".join(page.split()[:2]): page for page in step.pages}


def statement(name: str) -> str:
    """What a property says; "" for what is no numbered property."""
    if name in PROPERTIES:
        return PROPERTIES[name].statement
    return OTHERS.get(name, {"never": "an answer that must not be given", "crash": "the code fell over"}.get(name, ""))


def _left(story: Story, step: Step) -> list[str]:
    indent = "  " * story.actors.index(step.actor)
    lines = [f"{step.number:>3} {indent}{step.actor}: {step.does}"]
    lines += [f"    {indent}  . {_event(event)}" for event in step.events]
    if step.failed:
        lines.append(f"    {indent}  ! a fallible step fails")
    return lines


def _event(event: Event) -> str:
    fields = msgspec.structs.asdict(event)
    shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items() if name not in _QUIET)
    return f"{event.__struct_config__.tag} {shown}"


def _shown(value: object) -> str:
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 4096 else str(value)


def _row(left: list[str], right: list[str]) -> list[str]:
    left = [part for line in left for part in textwrap.wrap(line, LEFT, subsequent_indent=" " * 10) or [line]]
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    return [f"{ours:<{LEFT}} | {theirs}".rstrip() for ours, theirs in zip(left, right, strict=True)]


def perfetto(story: Story) -> str:
    """The story as Perfetto and chrome://tracing load it: a thread for each actor, a millisecond for each step."""
    threads = {actor: number + 1 for number, actor in enumerate(story.actors)}
    out: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"{story.scenario} {story.schedule.token()}"}}
    ]
    for actor, thread in threads.items():
        out.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": thread, "args": {"name": actor}})
    for place, step in enumerate(story.steps):
        at = {"pid": 1, "tid": threads[step.actor], "ts": place * 1000}
        args = {"where": step.where, "locks": list(step.locks), "pages": list(step.pages)}
        out.append({"ph": "X", "name": step.does, "dur": 900, "args": args, **at})
        for number, event in enumerate(step.events):
            moment = at | {"ts": place * 1000 + 100 + number}
            name = event.__struct_config__.tag
            out.append({"ph": "i", "s": "t", "name": name, "args": msgspec.to_builtins(event), **moment})
    broken = {"name": f"{story.property} is broken", "args": {"facts": story.facts}}
    out.append({"ph": "i", "s": "g", "pid": 1, "tid": 1, "ts": len(story.steps) * 1000, **broken})
    return json.dumps({"traceEvents": out, "displayTimeUnit": "ms"})


def as_json(story: Story) -> str:
    """The story as one JSON object: what `--trace` writes beside the Perfetto file."""
    return json.dumps(
        {
            "scenario": story.scenario,
            "schedule": story.schedule.token(),
            "property": story.property,
            "facts": story.facts,
            "actors": list(story.actors),
            "cycle_at": story.cycle_at,
            "steps": [
                {
                    "number": step.number,
                    "actor": step.actor,
                    "does": step.does,
                    "where": step.where,
                    "failed": step.failed,
                    "locks": list(step.locks),
                    "pages": list(step.pages),
                    "events": [msgspec.to_builtins(event) for event in step.events],
                }
                for step in story.steps
            ],
        },
        indent=1,
    )
