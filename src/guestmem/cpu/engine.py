"""Engine: what executes a guest, seen from KVM; GuestMemory: what an engine sees of KVM.

An engine runs guest instructions until something needs KVM and returns a `Stop` that says what. It never waits and
never faults memory in: a page that stage 2 does not hold is a `Stage2Miss`, KVM handles it (which may take locks) and
runs the engine again, which repeats the access. State is exact at every stop: a stop that KVM answers by running again
repeats the instruction, unless the stop's docstring says that it is complete.

Engines are serialised: one thread, one engine at a time, a slice at a time. A slice ends between two instructions, and
the order of slices is the scheduler's. The library in `native` can run CPUs in parallel too (cpu.h, CPU_MODE_PARALLEL).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, TypeAlias

from guestmem.cpu.registers import DebugRegisters, Events, Regs, Sregs


class HostWindow(NamedTuple):
    """A mapping in the server's own virtual memory. Bytes.

    A window may appear and go at any time, and another memory may come to be at its addresses. It must stay mapped
    from the first Translation that names it until `Engine.flush_tlb` of each engine that asked, at which the engine
    forgets addresses, and compares code before it executes what it has translated of the old memory. There is nothing
    else to tell the engine, and no limit on the number of windows.
    """

    base: int
    size: int


class Translation(NamedTuple):
    """Where a guest page is: the host address of its first byte, whether stage 2 lets it be written, its window."""

    hva: int
    writable: bool
    window: HostWindow

    def __fingerprint__(self) -> bool:
        """Without addresses: where the host put the page is not state."""
        return self.writable


class PageBit(NamedTuple):
    """The bit of a page-table entry with which a guest says which kind of page it means. No part of the address.

    With `set_is_private` it is the C-bit of an SNP guest: page walks and fetches are private whatever it says. Else it
    is the shared bit of a TD, to which neither tables nor code may be shared. Where entries have no such bit (no
    paging, entries of 32 bits) every access is private.

    Source: AMD APM vol. 2, 15.34.5; Documentation/arch/x86/amd-memory-encryption.rst. Intel TDX module base
    specification, "GPA space"; Documentation/arch/x86/tdx.rst.
    """

    position: int
    set_is_private: bool


class GuestMemory(Protocol):
    """Stage 2 as an engine asks it."""

    @property
    def page_bit(self) -> PageBit | None:
        """The guest's, given by the hardware that protects it; None where a guest cannot say. Never changes."""
        ...

    def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        """The 4K page of `gpa`, or None if stage 2 does not map it for such an access. Never waits.

        `private` is the kind that the guest itself asserts, by its `page_bit`; None where it cannot, and the attribute
        of the page decides.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Stage2Miss:
    """Stage 2 refused an access to `gpa`, of the guest or of its page walk. Run again to repeat it."""

    gpa: int
    write: bool = False
    fetch: bool = False
    private: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PortOut:
    """OUT of `size` bytes. Complete: the instruction pointer is past it."""

    port: int
    size: int
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class PortIn:
    """IN of `size` bytes, or `count` of them for a REP INS. `Engine.complete` finishes it; run without it asks again.

    The value is of `count * size` bytes, the first in the lowest.
    """

    port: int
    size: int
    count: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class MmioWrite:
    """Answer of `Engine.emulate_mmio`: `size` bytes `value` go to `gpa`. Complete, or run again for the rest of it."""

    gpa: int
    size: int
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class MmioRead:
    """Answer of `Engine.emulate_mmio`: the guest wants `size` bytes of `gpa`. `complete(value)` executes with it."""

    gpa: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReadMsr:
    """RDMSR of a register at which `set_stop_msrs` has it stop. At the instruction: `complete(value)` executes it,
    `raise_exception` ends it, run without either repeats it."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class WriteMsr:
    """WRMSR of a register at which `set_stop_msrs` has it stop. As ReadMsr; what `complete` is given is ignored."""

    index: int
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class Debug:
    """What `set_guest_debug` asked for. `vector` is 1 (#DB: a step, or a breakpoint of a debug register, which `dr6`
    tells apart) or 3 (INT3, at the instruction). Run again to go on."""

    vector: int
    rip: int
    dr6: int
    dr7: int


@dataclasses.dataclass(frozen=True, slots=True)
class Halt:
    """HLT. Complete."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hypercall:
    """VMCALL or VMMCALL: RAX and RBX, RCX, RDX, RSI. `complete(value)` puts the result into RAX. Past the instruction.

    `cpl` is the privilege level of the caller: KVM refuses hypercalls from outside ring 0.
    """

    nr: int
    args: tuple[int, int, int, int]
    cpl: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Pvalidate:
    """PVALIDATE, by an SNP guest, on the page at `gpa`; of 2M with `large`.

    The CPU does it by the RMP and what stage 2 maps: no reason to leave KVM_RUN. `complete(status | carry << 32)`
    finishes it with EAX and RFLAGS.CF, `raise_exception` ends it; run without either repeats it.
    """

    gpa: int
    large: bool
    validate: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Rmpadjust:
    """RMPADJUST, by an SNP guest, on the page at `gpa`; of 2M with `large`. As Pvalidate; `complete(status)` is EAX.

    `target` is the VMPL whose `permissions` are set; `vmsa`: the page is one.
    """

    gpa: int
    large: bool
    target: int
    permissions: int
    vmsa: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Vmgexit:
    """VMGEXIT, by an SNP guest. Past the instruction. `ghcb` is the value of the GHCB MSR, `complete` gives the new
    one."""

    ghcb: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tdcall:
    """TDCALL, by a TD. The leaf is in RAX and its arguments in the other registers; `complete` gives the new RAX,
    `set_regs` before it the other results. `raise_exception` ends it; run without either repeats it."""

    leaf: int


@dataclasses.dataclass(frozen=True, slots=True)
class Shutdown:
    """Triple fault: an exception that could not be delivered. The vCPU cannot go on."""


@dataclasses.dataclass(frozen=True, slots=True)
class InterruptWindow:
    """The guest could take an interrupt before its next instruction, and `request_interrupt_window` asks to know."""


@dataclasses.dataclass(frozen=True, slots=True)
class SliceOver:
    """The slice has ended between two instructions. Run again."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostFault:
    """The host refuses the memory behind a page that stage 2 holds: `hva` is where, for the access to `gpa`.

    The instruction has not happened. Run again to repeat it.
    """

    hva: int
    gpa: int
    write: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The engine cannot execute what stands at `rip`: KVM_EXIT_INTERNAL_ERROR. `why` is for the reader."""

    rip: int
    why: str


Stop: TypeAlias = (
    Stage2Miss
    | PortOut
    | PortIn
    | MmioWrite
    | MmioRead
    | ReadMsr
    | WriteMsr
    | Debug
    | Halt
    | Hypercall
    | Pvalidate
    | Rmpadjust
    | Vmgexit
    | Tdcall
    | Shutdown
    | InterruptWindow
    | SliceOver
    | HostFault
    | Failed
)

CpuidTable: TypeAlias = dict[tuple[int, int], tuple[int, int, int, int]]
"""(leaf, subleaf) to (eax, ebx, ecx, edx); subleaf 0 also answers for leaves that have none."""


class Engine(Protocol):
    """One virtual CPU."""

    def run(self) -> Stop:
        """Execute until a stop. Returns `SliceOver` after at most about a millisecond."""
        ...

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """Execute the instruction that missed stage 2 at `gpa`, which KVM found to be no memory.

        The answer is MmioRead or MmioWrite, or another stop if the instruction met that first.
        """
        ...

    def complete(self, value: int) -> None:
        """The value that the last stop asked for, if its docstring says so. Its instruction is finished at once.

        If the instruction meets another stop (a second access, a page that stage 2 does not hold), the next run returns
        that. So a VMM may leave the guest after `complete`, as KVM_RUN with immediate_exit does.
        """
        ...

    def raise_exception(self, vector: int, error_code: int) -> None:
        """The instruction of the last stop raises an exception in the guest instead, delivered at it.

        For what `complete` would answer, and for an access that missed stage 2. `error_code` is used where the vector
        has one: #VC (29) has.
        """
        ...

    def flush_tlb(self) -> None:
        """Forget every translation: the next access of each page asks GuestMemory again."""
        ...

    def set_cpuid(self, table: CpuidTable) -> None: ...

    def set_stop_msrs(self, ranges: tuple[range, ...], unknown: bool = False) -> None:
        """MSRs that are not the engine's: the guest's RDMSR and WRMSR are stops. None are at first. With `unknown` also
        those of which the engine knows nothing, which are #GP else."""
        ...

    def get_regs(self) -> Regs: ...

    def set_regs(self, regs: Regs) -> None: ...

    def get_sregs(self) -> Sregs: ...

    def set_sregs(self, sregs: Sregs) -> None: ...

    def close(self) -> None:
        """Give back what the engine holds. Idempotent."""
        ...


class CpuState(Protocol):
    """The rest of the state of a vCPU, which an engine has that executes real code. To be used between two runs."""

    request_interrupt_window: bool
    """Whether `run` returns InterruptWindow. Field of struct kvm_run."""

    def get_fpu(self) -> bytes:
        """The FXSAVE64 image, 512 bytes."""
        ...

    def set_fpu(self, image: bytes) -> None:
        """Raises: ValueError, for a wrong size or reserved bits of MXCSR."""
        ...

    def get_xsave(self) -> bytes:
        """The XSAVE area in standard form: 512 bytes of FXSAVE, 64 of header."""
        ...

    def set_xsave(self, area: bytes) -> None:
        """Of `area` the first 576 bytes. Raises: ValueError, for state that there is not, or as `set_fpu`."""
        ...

    def get_xcr0(self) -> int: ...

    def set_xcr0(self, value: int) -> None:
        """Raises: ValueError, without x87 (bit 0) or for state that there is not."""
        ...

    def get_debug_registers(self) -> DebugRegisters: ...

    def set_debug_registers(self, registers: DebugRegisters) -> None:
        """State only: a breakpoint hits once the guest itself has loaded DR7. Raises: ValueError, as KVM has EINVAL."""
        ...

    def set_guest_debug(self, control: int, registers: tuple[int, ...]) -> None:
        """struct kvm_guest_debug: KVM_GUESTDBG_* bits, and DR0 to DR7 as the VMM has them instead of the guest."""
        ...

    def get_msr(self, index: int) -> int | None:
        """None if there is no such register."""
        ...

    def set_msr(self, index: int, value: int) -> bool:
        """False if there is no such register or it does not take the value."""
        ...

    @property
    def cr8(self) -> int:
        """0 to 15, as MOV to CR8 left it."""
        ...

    @cr8.setter
    def cr8(self, value: int) -> None: ...

    def get_events(self) -> Events: ...

    def set_events(self, events: Events) -> None: ...

    def queue_interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT. The guest takes it as soon as RFLAGS.IF is set and no shadow is."""
        ...

    def queue_nmi(self) -> None:
        """KVM_NMI."""
        ...

    @property
    def interrupt_flag(self) -> bool:
        """RFLAGS.IF. Field of struct kvm_run."""
        ...

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether the guest would take an interrupt now, and none waits. Field of struct kvm_run."""
        ...
