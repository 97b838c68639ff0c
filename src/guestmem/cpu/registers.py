"""The register state of an x86 vCPU, as KVM_SET_REGS and KVM_SET_SREGS have it.

Field names and meanings are those of struct kvm_regs and struct kvm_sregs (arch/x86/include/uapi/asm/kvm.h); the
binary form is the business of `uapi`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Regs:
    """General registers. All 64 bit; `rflags` bit 1 reads as one."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclasses.dataclass(slots=True)
class Segment:
    """A segment register with its hidden part. `limit` is in bytes; the rest are the descriptor's bits."""

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the field's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclasses.dataclass(slots=True)
class DescriptorTable:
    """GDTR or IDTR. `base` is a linear address, `limit` the last valid byte."""

    base: int = 0
    limit: int = 0xFFFF


def _code() -> Segment:
    return Segment(base=0xFFFF0000, selector=0xF000, type=11)


@dataclasses.dataclass(slots=True)
class Sregs:
    """Segments, tables and control registers; the default is the state after reset (Intel SDM vol. 3, table 10-1)."""

    cs: Segment = dataclasses.field(default_factory=_code)
    ds: Segment = dataclasses.field(default_factory=Segment)
    es: Segment = dataclasses.field(default_factory=Segment)
    fs: Segment = dataclasses.field(default_factory=Segment)
    gs: Segment = dataclasses.field(default_factory=Segment)
    ss: Segment = dataclasses.field(default_factory=Segment)
    tr: Segment = dataclasses.field(default_factory=lambda: Segment(type=11, s=0))
    ldt: Segment = dataclasses.field(default_factory=lambda: Segment(type=2, s=0))
    gdt: DescriptorTable = dataclasses.field(default_factory=DescriptorTable)
    idt: DescriptorTable = dataclasses.field(default_factory=DescriptorTable)
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE00900


@dataclasses.dataclass(slots=True)
class DebugRegisters:
    """DR0 to DR3, DR6, DR7: struct kvm_debugregs."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400


@dataclasses.dataclass(slots=True)
class Events:
    """What waits to be delivered: struct kvm_vcpu_events, without SMIs and without the vector of a SIPI.

    `exception_pending` is before the next instruction, `exception_injected` is being delivered; None in place of an
    error code or payload (CR2 of a page fault) says that there is none. `interrupt_shadow` is
    KVM_X86_SHADOW_INT_STI (2) or 0: the CPU does not tell STI from MOV SS.
    """

    exception_injected: bool = False
    exception_pending: bool = False
    exception_nr: int = 0
    exception_error_code: int | None = None
    exception_payload: int | None = None
    interrupt_injected: bool = False
    interrupt_nr: int = 0
    interrupt_soft: bool = False
    interrupt_shadow: int = 0
    nmi_injected: bool = False
    nmi_pending: bool = False
    nmi_masked: bool = False
