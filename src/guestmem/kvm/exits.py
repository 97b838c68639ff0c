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

    @property
    def userfault(self) -> bool:
        """KVM_MEMORY_EXIT_FLAG_USERFAULT: the page is there for the VMM to bring."""
        return self.refusal.rule == "fault.userfault"


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
class MsrExit:
    """KVM_EXIT_X86_RDMSR or, if `is_write`, KVM_EXIT_X86_WRMSR. `data` is what was written, or is to be filled in.

    `reason` is one of KVM_MSR_EXIT_REASON_*. With `error` filled in the guest gets #GP.
    """

    index: int
    is_write: bool
    reason: int
    data: int = 0
    error: bool = False


@dataclasses.dataclass(slots=True)
class DebugExit:
    """KVM_EXIT_DEBUG: what KVM_SET_GUEST_DEBUG asked for has happened. `exception` is #DB (1) or #BP (3)."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclasses.dataclass(slots=True)
class IoapicEoiExit:
    """KVM_EXIT_IOAPIC_EOI: the guest has ended the level-triggered interrupt `vector`, of the VMM's IOAPIC."""

    vector: int


@dataclasses.dataclass(slots=True)
class UninitializedExit:
    """KVM_RUN fails with EAGAIN: the vCPU had to wait for INIT, and has it. To be run again, for SIPI."""


@dataclasses.dataclass(slots=True)
class InterruptedExit:
    """KVM_RUN fails with EINTR: `immediate_exit` was set, or a signal is pending, which alone is an exit reason."""

    by_signal: bool = False


Exit: TypeAlias = (
    IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | HltExit
    | ShutdownExit
    | IrqWindowOpenExit
    | FailEntryExit
    | SystemEventExit
    | InternalErrorExit
    | MsrExit
    | DebugExit
    | IoapicEoiExit
    | UninitializedExit
    | InterruptedExit
)
