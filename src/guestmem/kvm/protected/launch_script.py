"""A launch in a script: the blocking calls of `Vm.launch`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from guestmem.kvm.addresses import gfn_of
from guestmem.kvm.protected.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vm import Kvm

T = TypeVar("T")


class Memory(Protocol):
    """Host memory that bytes are taken from."""

    @property
    def hva(self) -> int: ...


class LaunchHandle:
    """The launch of one protected virtual machine."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, T], str], T], kvm: Kvm) -> None:
        self._run: Any = run
        self._kvm = kvm

    def start(self, parameters: Any = None) -> None:
        """SNP_LAUNCH_START and its like, with the architecture's own parameters (SNP's policy, TDX's TdParams), None
        for its default. Raises: Refusal `launch.*`."""
        self._run(launch_start(self._kvm, parameters), "launch start")

    def update(self, gpa: int, source: Memory | None = None, pages: int = 1, kind: int = 0) -> int:
        """SNP_LAUNCH_UPDATE: add and measure private pages, in place without `source`; how many were done.

        Raises: Refusal `launch.*`, `populate.*`.
        """
        hva = source.hva if source is not None else None
        done: int = self._run(launch_update(self._kvm, gfn_of(gpa), hva, pages, kind), "launch update")
        return done

    def finish(self, parameters: Any = None) -> bytes:
        """SNP_LAUNCH_FINISH and its like, with the architecture's own parameters (SNP's LaunchFinish): the measurement.
        Raises: Refusal `launch.*`."""
        digest: bytes = self._run(launch_finish(self._kvm, parameters), "launch finish")
        return digest
