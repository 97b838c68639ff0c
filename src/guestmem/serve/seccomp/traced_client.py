"""TracedClient: a client whose calls are seen from outside. Its vCPUs run in the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestmem.serve.client import Client
from guestmem.serve.seccomp.adopted_memory import AdoptedMemory

if TYPE_CHECKING:
    from guestmem.serve.server import Server


class TracedClient(Client):
    """See the module."""

    runs_vcpus = False

    def __init__(self, server: Server, number: int, pid: int) -> None:
        super().__init__(server, number, pid)
        self.memory = AdoptedMemory(self)
