"""Refusal: the one exception by which guestmem says no.

It lives here because every room may say no and every room may import `trace`, and because a refusal is something that
a trace reports like any other event. The rules themselves, with check order, ABI level and source, are one table in
`guestmem.uapi.rules`; a test holds the two against each other.
"""

from __future__ import annotations

import errno as _errno

EHWPOISON = 133
"""Memory page has hardware error (asm-generic/errno.h). Python's errno module lacks it."""

_NAMES = {EHWPOISON: "EHWPOISON", _errno.EOPNOTSUPP: "EOPNOTSUPP"}  # Python says ENOTSUP for the latter


class Refusal(OSError):
    """An operation that was refused, and left everything as it was.

    `errno` is what the kernel's caller would see, `rule` a stable dotted name (`bind.past_end`) that
    `guestmem explain` knows, `facts` the numbers that broke it.
    """

    def __init__(self, errno: int, rule: str, **facts: object) -> None:
        self.rule = rule
        self.facts = facts
        super().__init__(errno, f"[{rule}] {format_facts(facts)}".rstrip())

    def __str__(self) -> str:
        return f"{errno_name(self.errno)} {self.strerror}"

    def adding(self, **facts: object) -> Refusal:
        """The same refusal with more facts, or other values of some."""
        return _rebuild(self.errno or 0, self.rule, {**self.facts, **facts})

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.errno, self.rule, self.facts))


def _rebuild(errno: int, rule: str, facts: dict[str, object]) -> Refusal:
    return Refusal(errno, rule, **facts)


def errno_name(number: int | None) -> str:
    """EINVAL for 22; the number itself where there is no name."""
    if number in _NAMES:
        return _NAMES[number]
    return _errno.errorcode.get(number, str(number)) if number is not None else "?"


def format_facts(facts: dict[str, object]) -> str:
    """`offset 0x2000, size 0x1000`: integers from 10 up in hex, as addresses and sizes are read."""
    return ", ".join(f"{name} {_format_fact(value)}" for name, value in facts.items())


def _format_fact(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10:
        return hex(value)
    return str(value)
