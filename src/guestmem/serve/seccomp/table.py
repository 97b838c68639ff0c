"""From a system call's number to the function that looks at it.

The function gets the thread and the call, and says at once what is to be done, see tracee.Work; mostly nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from guestmem.serve.seccomp import (
    calls_close,
    calls_io,
    calls_ioctl,
    calls_memory,
    calls_mremap,
    calls_open,
    calls_stat,
)
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import Tracee, Work

Handler: TypeAlias = Callable[[Tracee, SystemCall], Work]

_TABLE: Mapping[Nr, Handler] = {
    **calls_open.TABLE,
    **calls_ioctl.TABLE,
    **calls_memory.TABLE,
    **calls_mremap.TABLE,
    **calls_io.TABLE,
    **calls_close.TABLE,
    **calls_stat.TABLE,
}


def handle(tracee: Tracee, call: SystemCall) -> Work:
    handler = _TABLE.get(Nr(call.number))
    return handler(tracee, call) if handler is not None else None
