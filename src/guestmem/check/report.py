"""Report: what a check has found, as text, TAP or JSON."""

from __future__ import annotations

import json

from guestmem.check.explore import EXHAUSTED, LIMIT, VIOLATED, Result
from guestmem.check.work import Hunted


def text_line(outcome: Result | Hunted) -> str:
    """One line for a terminal."""
    if isinstance(outcome, Hunted):
        return _hunted_line(outcome)
    how = f"{outcome.executions:,} executions, {outcome.states:,} states, {outcome.seconds:.2f} s"
    line = f"{outcome.verdict:<9} {outcome.name:<32} {outcome.bound}; {how}"
    if outcome.verdict == VIOLATED:
        line += f"\n          {outcome.property}: {outcome.facts}"
    if outcome.verdict == LIMIT:
        line += f"\n          stopped at {outcome.why}: nothing is claimed of what was not run"
        if outcome.never_seen:
            line += f"; not seen yet: {', '.join(outcome.never_seen)}"
    return line


def _hunted_line(hunted: Hunted) -> str:
    how = f"{hunted.executions:,} executions, {hunted.steps:,} steps, {hunted.seconds:.2f} s"
    if not hunted.found:
        return f"NOT FOUND {hunted.bug:<4} {hunted.name:<28} {how}"
    breaks = hunted.property if hunted.expected else f"{hunted.property} (not what the mutant names)"
    return f"found     {hunted.bug:<4} {hunted.name:<28} {breaks:<5} in {hunted.scenario}; {how}"


def summary(results: list[Result], hunted: list[Hunted], seconds: float, bytes_most: int) -> str:
    """The last lines: how many of each verdict."""
    lines = []
    if results:
        counts = {
            verdict: sum(result.verdict == verdict for result in results) for verdict in (EXHAUSTED, LIMIT, VIOLATED)
        }
        executions = sum(result.executions for result in results)
        lines.append(
            f"{len(results)} scenarios: {counts[EXHAUSTED]} exhausted, {counts[LIMIT]} stopped at a limit,"
            f" {counts[VIOLATED]} violated; {executions:,} executions in {seconds:.1f} s,"
            f" largest visited set {bytes_most / (1 << 20):.1f} MiB"
        )
    if hunted:
        found = sum(each.found for each in hunted)
        slowest = max(each.seconds for each in hunted)
        lines.append(f"{len(hunted)} mutants: {found} found, in {seconds:.1f} s; the slowest took {slowest:.1f} s")
    return "\n".join(lines)


def as_json(results: list[Result], hunted: list[Hunted]) -> str:
    """The documented object: docs/check/reference.md."""
    return json.dumps(
        {
            "scenarios": [
                {
                    "name": result.name,
                    "verdict": result.verdict,
                    "bound": result.bound,
                    "executions": result.executions,
                    "states": result.states,
                    "seconds": round(result.seconds, 3),
                    "property": result.property or None,
                    "schedule": result.schedule.token() if result.schedule else None,
                }
                for result in results
            ],
            "mutants": [
                {
                    "name": each.name,
                    "found": each.found,
                    "property": each.property or None,
                    "scenario": each.scenario or None,
                    "executions": each.executions,
                    "seconds": round(each.seconds, 3),
                    "schedule": each.schedule.token() if each.schedule else None,
                }
                for each in hunted
            ],
        },
        indent=1,
    )


def as_tap(results: list[Result], hunted: list[Hunted]) -> str:
    """Test Anything Protocol 14. A limit is `ok` with a TODO, which harnesses count apart from a pass."""
    lines = ["TAP version 14", f"1..{len(results) + len(hunted)}"]
    for number, result in enumerate(results, 1):
        state = "not ok" if result.verdict == VIOLATED else "ok"
        todo = f" # TODO not exhausted: {result.why}" if result.verdict == LIMIT else ""
        lines.append(f"{state} {number} - {result.name} ({result.bound}){todo}")
        if result.verdict == VIOLATED:
            token = result.schedule.token() if result.schedule else ""
            lines += ["  ---", f"  property: {result.property}", f"  facts: {json.dumps(result.facts)}"]
            lines += [f"  schedule: {token!r}", "  ..."]
    for number, each in enumerate(hunted, len(results) + 1):
        state = "ok" if each.found else "not ok"
        lines.append(f"{state} {number} - mutant {each.bug} {each.name}")
    return "\n".join(lines)
