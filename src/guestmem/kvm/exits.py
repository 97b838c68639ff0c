"""Why KVM_RUN returned: what struct kvm_run says, as Python values.

An exit that asks for something (a port or MMIO read, a hypercall) has a field for the answer; the VMM fills it in and
runs the vCPU again. Source: Documentation/virt/kvm/api.rst, section 5.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from guestmem.trace import Refusal


@dataclasses.dataclass(slots=True)
class IoExit:
    """KVM_EXIT_IO. `data` is what an OUT wrote, or is to be filled in for an IN: `count` times `size` bytes."""

    port: int
    size: int
    is_write: bool
    data: int = 0
    count: int = 1


@dataclasses.dataclass(slots=True)
class MmioExit:
    """KVM_EXIT_MMIO. `data` is what was written, or is to be filled in for a read. `size` in bytes, at most 8."""

    gpa: int
    size: int
    is_write: bool
    data: int = 0


@dataclasses.dataclass(slots=True)
class HypercallExit:
    """KVM_EXIT_HYPERCALL, for calls that the VM has enabled. `ret` goes to the guest's RAX."""

    nr: int
    args: tuple[int, int, int]
    ret: int = 0


@dataclasses.dataclass(slots=True)
class MemoryFaultExit:
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN fails with `refusal.errno` (EFAULT or EHWPOISON) and these fields are valid.

    `private` is the access that the guest made, not the state of the page. Bytes; `gpa` is page aligned.
    """

    gpa: int
    size: int
    private: bool
    refusal: Refusal


@dataclasses.dataclass(slots=True)
class LeftExit:
    """KVM_RUN has come back where the vCPU runs, in another process: struct kvm_run says why already."""


@dataclasses.dataclass(slots=True)
class HltExit:
    """KVM_EXIT_HLT (no interrupt controller in the kernel)."""


@dataclasses.dataclass(slots=True)
class ShutdownExit:
    """KVM_EXIT_SHUTDOWN: triple fault."""


@dataclasses.dataclass(slots=True)
class IrqWindowOpenExit:
    """KVM_EXIT_IRQ_WINDOW_OPEN: the guest could take an interrupt, and the VMM asked to know."""


@dataclasses.dataclass(slots=True)
class FailEntryExit:
    """KVM_EXIT_FAIL_ENTRY: hardware did not let the vCPU into the guest, as `call` said with `code`."""

    call: str
    code: str


@dataclasses.dataclass(slots=True)
class SystemEventExit:
    """KVM_EXIT_SYSTEM_EVENT: the guest asks to be ended. `type` is KVM_SYSTEM_EVENT_*, `data` at most 16 values."""

    type: int
    data: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class InternalErrorExit:
    """KVM_EXIT_INTERNAL_ERROR, suberror emulation: the engine cannot execute what stands at `rip`."""

    rip: int
    why: str


@dataclasses.dataclass(slots=True)
class InterruptedExit:
    """KVM_RUN fails with EINTR: `immediate_exit` was set, or a signal is pending, which alone is an exit reason."""

    by_signal: bool = False


Exit: TypeAlias = (
    IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | LeftExit
    | HltExit
    | ShutdownExit
    | IrqWindowOpenExit
    | FailEntryExit
    | SystemEventExit
    | InternalErrorExit
    | InterruptedExit
)
