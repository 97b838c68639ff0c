"""ClientThread: a thread of a client as calls and the server see it, however its calls come here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from guestmem.sched import Task
from guestmem.serve.wire import Upcall

if TYPE_CHECKING:
    from guestmem.serve.channel import UpcallResult
    from guestmem.serve.client import Client


class ClientThread(Protocol):
    """`task` is the call that is under way, which the server sets; `open` is false once the thread is gone."""

    task: Task[Any] | None

    @property
    def client(self) -> Client | None: ...

    @property
    def open(self) -> bool: ...

    def answer(self, message: bytes, fds: list[int]) -> None:
        """The answer to its request (wire.pack_answer), and descriptors with it, which are the receiver's to close."""
        ...

    async def upcall(
        self,
        op: Upcall,
        payload: bytes = b"",
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: tuple[int, ...] = (),
    ) -> UpcallResult:
        """Have it do something; see wire.md. `fds` stay the caller's. Raises: ClientGone."""
        ...
