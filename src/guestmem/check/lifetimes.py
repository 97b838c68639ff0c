"""Lifetimes: what each policy of `arch.Lifetime` lets a guest see, breaks and costs, over all interleavings.

The questions are the scenarios whose names begin with `lifetime_`. Each is explored to its end under each policy, for
each architecture. Beside the product's own properties S9 is asked in its strict form, an entry has the address of a
binding that shows its page; what breaks that is noted. SNP is asked twice: a guest may validate a page whenever it
finds it not validated, or take that for an attack.

Source: spec/seed.md section 6, tests (a) to (e); spec/semantics.md section 12.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

from guestmem.arch import Lifetime
from guestmem.arch.snp import SnpPlatform
from guestmem.check.explore import EXHAUSTED, explore
from guestmem.check.machine import Machine
from guestmem.check.ownership import owned_pages, strayed
from guestmem.check.scenario import Scenario, built_in
from guestmem.check.strategies.states import States
from guestmem.sched import Policy, Task
from guestmem.uapi.kvm import VmType

PREFIX = "lifetime_"
OTHERS = {"TDX": VmType.TDX, "CCA": VmType.ARM_REALM, "pKVM": VmType.ARM_PROTECTED}


@dataclasses.dataclass
class Seen:
    """What was seen of one question: `guest`, the answers of its guest; `strayed`, how entries broke the strict S9;
    `calls` of hardware and firmware, `left` entries and `busy` numbers of identities at the ends of executions."""

    guest: set[str] = dataclasses.field(default_factory=set)
    strayed: set[str] = dataclasses.field(default_factory=set)
    calls: set[int] = dataclasses.field(default_factory=set)
    left: set[int] = dataclasses.field(default_factory=set)
    busy: set[int] = dataclasses.field(default_factory=set)

    def cells(self) -> tuple[str, ...]:
        """As text: guest, S9, calls, entries left, identities busy."""
        return (
            ", ".join(sorted(map(_told, self.guest))),
            ", ".join(sorted(self.strayed)) or "kept",
            _range(self.calls),
            _range(self.left),
            _range(self.busy),
        )


class WatchedMachine(Machine):
    """A machine that notes in `seen` what its executions come to. How many calls were made is a part of its state, or
    of two ways to one state only the first would be counted."""

    def __init__(self, *, seen: Seen, protected: VmType, revalidates: bool, **options: Any) -> None:
        self.calls = 0
        super().__init__(**options)
        self.protected = protected
        self._seen = seen
        self._revalidates = revalidates

    def start(self, policy: Policy) -> list[Task[None]]:
        self.before_start.append(self._end_validation)  # of what the guest has touched until then
        return super().start(policy)

    def _end_validation(self) -> None:
        snp = self.platforms[VmType.SNP]
        assert isinstance(snp, SnpPlatform)
        snp.guests_validate = self._revalidates

    def firmware_fails(self, call: str) -> bool:
        self.calls += self.scheduler.explores
        return super().firmware_fails(call)

    def digest(self) -> bytes:
        return hashlib.blake2b(super().digest() + self.calls.to_bytes(4, "little"), digest_size=16).digest()

    def check_state(self) -> None:
        super().check_state()
        self._seen.strayed.update(strayed(self))

    def check_end(self) -> None:
        seen = self._seen
        seen.guest.update(self.answers["guest"])
        seen.calls.add(self.calls)
        seen.left.add(sum(1 for _ in owned_pages(self)))
        seen.busy.add(len(self.identities.live))
        super().check_end()


def questions() -> list[Scenario]:
    """By what they ask, so that questions of one event stand together."""
    found = (scenario for name, scenario in built_in().items() if name.startswith(PREFIX))
    return sorted(found, key=lambda question: question.summary)


def ask(question: Scenario, policy: Lifetime, protected: VmType, *, revalidates: bool = True) -> Seen:
    """Explore a question to its end. Raises: AssertionError if a property of the product breaks."""
    seen = Seen()
    options = {"seen": seen, "protected": protected, "revalidates": revalidates, "lifetime": policy}
    build = functools.partial(question.build, WatchedMachine, **options)
    result = explore(dataclasses.replace(question, build=build, sometimes=frozenset()), States(question.preemptions))
    assert result.verdict == EXHAUSTED, f"{question.name} under {policy.value}: {result.property} {result.facts}"
    return seen


def report() -> str:
    """Two tables in Markdown: SNP in full, and what guests see on the others."""
    full = [["question", "policy", "the guest", "that validates once", "S9, strictly", "calls", "left", "identities"]]
    short = [["question", *OTHERS]]
    for question in questions():
        title = question.summary.rstrip(".")
        full += [[title, policies, *cells] for policies, cells in _in_full(question)]
        short.append([title, *(_in_short(question, protected) for protected in OTHERS.values())])
    return f"{_table(full)}\n\n{_table(short)}"


def _in_full(question: Scenario) -> list[tuple[str, tuple[str, ...]]]:
    cells = {}
    for policy in Lifetime:
        guest, *costs = ask(question, policy, VmType.SNP).cells()
        once = ask(question, policy, VmType.SNP, revalidates=False).cells()[0]
        cells[policy] = (guest, "the same" if once == guest else once, *costs)
    return _alike(cells)


def _in_short(question: Scenario, protected: VmType) -> str:
    parts = _alike({policy: ask(question, policy, protected).cells()[:1] for policy in Lifetime})
    return "; ".join(cell if len(parts) == 1 else f"{policies}: {cell}" for policies, (cell,) in parts)


def _alike(cells: dict[Lifetime, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """The policies that come to the same, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for policy, same in cells.items():
        groups.setdefault(same, []).append(policy.value)
    return [(", ".join(policies) if len(policies) < len(cells) else "all", same) for same, policies in groups.items()]


def _told(answer: str) -> str:
    """A guest stores 7 or 9, finds zeros, or all ones where there is no slot; what else it reads it did not write."""
    if not answer.startswith("ok 0x"):
        return f"`{answer}`"
    byte = int(answer.removeprefix("ok "), 16)
    return {0: "reads 0", 7: "reads 7", 9: "reads 9", 0xFF: "no slot"}.get(byte, "reads ciphertext")


def _range(numbers: Iterable[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
