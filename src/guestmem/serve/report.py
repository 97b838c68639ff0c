"""What happened during a run, for `--explain`: calls by kind, refusals with their rules, what was not served."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import TYPE_CHECKING

from guestmem.serve.ioctl_names import ioctl_name
from guestmem.serve.wire import Op, Request
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.call import Call
    from guestmem.serve.client import Client

_ORDINARY = ("run.interrupted",)


class Report:
    """Counts only; a run of millions of calls costs one dictionary entry for each kind."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[int, int]] = Counter()  # by op and, for ioctls, number
        self.refusals: Counter[tuple[str, str]] = Counter()  # by call and rule
        self.examples: dict[tuple[str, str], str] = {}  # the first of each, with its numbers
        self.unknown: Counter[tuple[str, int]] = Counter()
        self.bugs: list[str] = []
        self.clients: list[tuple[int, str]] = []
        self.notes: list[str] = []

    def count(self, request: Request) -> None:
        self._requests[request.op, request.a if request.op == Op.IOCTL else 0] += 1

    @property
    def calls(self) -> Counter[str]:
        """How often each call was made, by name."""
        named: Counter[str] = Counter()
        for (op, number), count in self._requests.items():
            named[ioctl_name(number & 0xFFFF_FFFF) if op == Op.IOCTL else Op(op).name.lower()] += count
        return named

    def client(self, client: Client) -> None:
        self.clients.append((client.pid, client.name()))

    def refused(self, call: Call, refusal: Refusal) -> None:
        if refusal.rule in _ORDINARY:
            return
        if refusal.rule == "ioctl.unknown":
            self.unknown[str(refusal.facts.get("on")), call.request.a & 0xFFFF_FFFF] += 1
            return
        kind = call_name(call), refusal.rule
        self.refusals[kind] += 1
        self.examples.setdefault(kind, str(refusal))

    def failed(self, call: Call, bug: Exception) -> None:
        """An error that is no refusal is a bug of ours: the client got EIO."""
        self.bug(call_name(call), bug)

    def bug(self, what: str, bug: Exception) -> None:
        """The same, outside of a call of the wire."""
        self.bugs.append(f"{what}:\n{''.join(traceback.format_exception(bug))}")


def call_name(call: Call) -> str:
    """KVM_CREATE_VM, or the name of what is no ioctl."""
    request = call.request
    if request.op == Op.IOCTL:
        return ioctl_name(request.a & 0xFFFF_FFFF)
    return Op(request.op).name.lower()
