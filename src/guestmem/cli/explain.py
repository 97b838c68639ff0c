"""`guestmem explain`: what a rule says and where it comes from."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from guestmem.uapi.rules import RULES, Rule


def explain(
    rule: Annotated[str | None, typer.Argument(help="A rule's name, or the start of one; all rules without.")] = None,
) -> None:
    """Print a rule by which guestmem refuses: errno, place in the order of checks, source."""
    found = [entry for name, entry in RULES.items() if rule is None or name == rule or name.startswith(f"{rule}.")]
    if not found:
        near = difflib.get_close_matches(rule or "", RULES, n=3, cutoff=0.4)
        typer.echo(f"no rule {rule!r}" + (f"; did you mean {', '.join(near)}?" if near else ""), err=True)
        raise typer.Exit(2)
    for entry in found:
        typer.echo(_text(entry))


def _text(rule: Rule) -> str:
    levels = f", levels {rule.levels}" if rule.levels else ""
    return (
        f"{rule.name}: {' or '.join(rule.errnos)}, {rule.text}\n"
        f"    {rule.call}, check {rule.order}{levels}; source: {rule.source}"
    )
