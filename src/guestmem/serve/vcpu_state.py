"""Register state of a vCPU in the structures of the KVM interface (arch/x86/include/uapi/asm/kvm.h).

Each pair converts between bytes and what the engine has; a value that the CPU would refuse is EINVAL.
"""

from __future__ import annotations

import dataclasses
import errno
import struct
from typing import cast

from guestmem.cpu.engine import CpuState
from guestmem.cpu.msrs import APIC_BASE
from guestmem.cpu.registers import DebugRegisters, DescriptorTable, Events, Regs, Segment, Sregs
from guestmem.cpu.x86 import CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from guestmem.kvm.irqchip import lapic_page
from guestmem.kvm.vcpu import Vcpu
from guestmem.serve.kvm_run import KvmRun
from guestmem.trace import Refusal

_REGS = struct.Struct("<18Q")
_SEGMENT = struct.Struct("<QIH9Bx")
_TABLE = struct.Struct("<QH6x")
_CONTROL = struct.Struct("<7Q32x")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_DEBUG = struct.Struct("<4QQQQ72x")
_EVENTS = struct.Struct("<4BI4B3BxII4BB26xBQ")
_XCRS = struct.Struct("<II")
_XCR = struct.Struct("<IIQ")

_VALID_SMM, _VALID_PAYLOAD, _VALID_TRIPLE_FAULT = 1 << 3, 1 << 4, 1 << 5
_VALID_SHADOW, _VALID_SIPI_VECTOR, _VALID_NMI_PENDING = 1 << 2, 1 << 1, 1 << 0


def cpu(vcpu: Vcpu) -> CpuState:
    """The engine of a vCPU that is served is a real CPU, whose whole state can be had."""
    return cast(CpuState, vcpu.engine)


def inject_exception(vcpu: Vcpu, vector: int) -> None:
    """One without an error code, which the guest takes next."""
    events = cpu(vcpu).get_events()
    injected = dataclasses.replace(events, exception_injected=True, exception_nr=vector, exception_error_code=None)
    cpu(vcpu).set_events(injected)


def write_run_state(run: KvmRun, vcpu: Vcpu) -> None:
    """What every exit says of the vCPU besides its reason."""
    state = cpu(vcpu)
    base = vcpu.lapic.base if vcpu.lapic is not None else state.get_msr(APIC_BASE) or 0
    run.write_state(vcpu.interrupts.ready_for_injection, state.interrupt_flag, state.cr8, base)


def get_regs(vcpu: Vcpu) -> bytes:
    r = vcpu.engine.get_regs()
    return _REGS.pack(
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp,
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rip, r.rflags,
    )  # fmt: skip


def set_regs(vcpu: Vcpu, data: bytes) -> None:
    regs = Regs(*_REGS.unpack(data))
    regs.rflags |= 2
    vcpu.engine.set_regs(regs)


def get_sregs(vcpu: Vcpu) -> bytes:
    s = vcpu.engine.get_sregs()
    if vcpu.lapic is not None:
        s.apic_base = vcpu.lapic.base
    segments = b"".join(_pack_segment(getattr(s, name)) for name in _SEGMENTS)
    tables = _TABLE.pack(s.gdt.base, s.gdt.limit & 0xFFFF) + _TABLE.pack(s.idt.base, s.idt.limit & 0xFFFF)
    return segments + tables + _CONTROL.pack(s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base)


def set_sregs(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `sregs.invalid`, `sregs.apic_base`. Source: kvm_is_valid_sregs()."""
    segments = {name: _unpack_segment(data, place * _SEGMENT.size) for place, name in enumerate(_SEGMENTS)}
    at = len(_SEGMENTS) * _SEGMENT.size
    gdt, idt = (DescriptorTable(*_TABLE.unpack_from(data, at + place * _TABLE.size)) for place in (0, 1))
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(data, at + 2 * _TABLE.size)
    cs = segments["cs"]
    if cr0 & CR0_PG and efer & EFER_LME:
        valid = bool(cr4 & CR4_PAE and efer & EFER_LMA)
    else:
        valid = not (efer & EFER_LMA or cs.l)
    if not valid:
        raise Refusal(errno.EINVAL, "sregs.invalid", cr0=cr0, cr4=cr4, efer=efer, cs_l=cs.l)
    if vcpu.lapic is not None and not vcpu.lapic.set_base(apic_base, from_guest=False):
        raise Refusal(errno.EINVAL, "sregs.apic_base", apic_base=apic_base)
    vcpu.engine.set_sregs(Sregs(**segments, gdt=gdt, idt=idt, cr0=cr0, cr2=cr2, cr3=cr3, cr4=cr4, cr8=cr8, efer=efer,
                                apic_base=apic_base))  # fmt: skip


def get_sregs2(vcpu: Vcpu) -> bytes:
    """struct kvm_sregs2: the same without the interrupt, and PDPTRs, of which the engine keeps none."""
    return get_sregs(vcpu)[:_SREGS_WITHOUT_INTERRUPT] + bytes(_SREGS2_REST)


def set_sregs2(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `sregs.invalid`, `sregs.apic_base`. Source: __set_sregs2."""
    (flags,) = struct.unpack_from("<Q", data, _SREGS_WITHOUT_INTERRUPT)
    if flags & ~_PDPTRS_VALID:
        raise Refusal(errno.EINVAL, "sregs.invalid", flags=flags)
    set_sregs(vcpu, data[:_SREGS_WITHOUT_INTERRUPT].ljust(_SREGS_SIZE, b"\0"))


_SREGS_WITHOUT_INTERRUPT, _SREGS_SIZE, _SREGS2_REST = 280, 312, 40
_PDPTRS_VALID = 1


def _pack_segment(s: Segment) -> bytes:
    return _SEGMENT.pack(
        s.base, s.limit & 0xFFFF_FFFF, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable
    )


def _unpack_segment(data: bytes, at: int) -> Segment:
    base, limit, selector, *bits = _SEGMENT.unpack_from(data, at)
    type_, present, dpl, db, s, l, g, avl, unusable = bits  # noqa: E741 - the field's name
    return Segment(base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable)


# Floating point. The engine has the FXSAVE image, in which struct kvm_fpu has another order.


def get_fpu(vcpu: Vcpu) -> bytes:
    image = cpu(vcpu).get_fpu()
    fcw, fsw, ftw, fop = struct.unpack_from("<HHBxH", image, 0)
    fip, fdp, mxcsr = struct.unpack_from("<QQI", image, 8)
    head = image[32:160] + struct.pack("<HHBBHQQ", fcw, fsw, ftw, 0, fop, fip, fdp)
    return head + image[160:416] + struct.pack("<II", mxcsr, 0)


def set_fpu(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `fpu.invalid`."""
    fcw, fsw, ftw, _, fop, fip, fdp = struct.unpack_from("<HHBBHQQ", data, 128)
    (mxcsr,) = struct.unpack_from("<I", data, 408)
    image = bytearray(cpu(vcpu).get_fpu())
    struct.pack_into("<HHBxH", image, 0, fcw, fsw, ftw, fop)
    struct.pack_into("<QQI", image, 8, fip, fdp, mxcsr)
    image[32:160] = data[:128]
    image[160:416] = data[152:408]
    try:
        cpu(vcpu).set_fpu(bytes(image))
    except ValueError as error:
        raise Refusal(errno.EINVAL, "fpu.invalid", mxcsr=mxcsr) from error


def get_xsave(vcpu: Vcpu) -> bytes:
    return cpu(vcpu).get_xsave().ljust(4096, b"\0")


def set_xsave(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `fpu.invalid`."""
    try:
        cpu(vcpu).set_xsave(data)
    except ValueError as error:
        raise Refusal(errno.EINVAL, "fpu.invalid", why=str(error)) from error


def get_xcrs(vcpu: Vcpu) -> bytes:
    return (_XCRS.pack(1, 0) + _XCR.pack(0, 0, cpu(vcpu).get_xcr0())).ljust(392, b"\0")


def set_xcrs(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `xcrs.invalid`. Source: kvm_vcpu_ioctl_x86_set_xcrs."""
    count, flags = _XCRS.unpack_from(data)
    if count > 16 or flags:
        raise Refusal(errno.EINVAL, "xcrs.invalid", count=count, flags=flags)
    for place in range(count):
        number, _, value = _XCR.unpack_from(data, _XCRS.size + place * _XCR.size)
        if number == 0:
            try:
                cpu(vcpu).set_xcr0(value)
            except ValueError as error:
                raise Refusal(errno.EINVAL, "xcrs.invalid", value=value) from error
            return


# Debug registers, events, local APIC


def get_debugregs(vcpu: Vcpu) -> bytes:
    registers = cpu(vcpu).get_debug_registers()
    return _DEBUG.pack(*registers.db, registers.dr6, registers.dr7, 0)


def set_debugregs(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `debugregs.invalid`."""
    *db, dr6, dr7, flags = _DEBUG.unpack(data)
    if flags:
        raise Refusal(errno.EINVAL, "debugregs.invalid", flags=flags)
    registers = DebugRegisters((db[0], db[1], db[2], db[3]), dr6, dr7)
    try:
        cpu(vcpu).set_debug_registers(registers)
    except ValueError as error:
        raise Refusal(errno.EINVAL, "debugregs.invalid", dr6=dr6, dr7=dr7) from error


def get_events(vcpu: Vcpu) -> bytes:
    """An exception that waits looks as one that is injected already, unless the VMM knows payloads."""
    e, kvm = cpu(vcpu).get_events(), vcpu.kvm
    injected, pending = e.exception_injected, e.exception_pending
    flags = _VALID_NMI_PENDING | _VALID_SHADOW | _VALID_SMM
    if kvm.exception_payload:
        flags |= _VALID_PAYLOAD
    else:
        injected, pending = injected or pending, False
    if kvm.triple_fault_event:
        flags |= _VALID_TRIPLE_FAULT
    payload = e.exception_payload if kvm.exception_payload else None
    return _EVENTS.pack(
        injected, e.exception_nr, e.exception_error_code is not None, pending, e.exception_error_code or 0,
        e.interrupt_injected, e.interrupt_nr, e.interrupt_soft, e.interrupt_shadow,
        e.nmi_injected, e.nmi_pending or vcpu.interrupts.nmi_pending, e.nmi_masked,
        0, flags, 0, 0, 0, 0, kvm.triple_fault_event and vcpu.triple_fault, payload is not None, payload or 0,
    )  # fmt: skip


def set_events(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `events.invalid`. Source: kvm_vcpu_ioctl_x86_set_vcpu_events."""
    (
        injected, nr, has_code, pending, code, irq, irq_nr, soft, shadow, nmi, nmi_pending, nmi_masked,
        sipi_vector, flags, smm, smi_pending, smm_inside_nmi, _latched_init, triple_fault, has_payload, payload,
    ) = _EVENTS.unpack(data)  # fmt: skip
    allowed = _VALID_NMI_PENDING | _VALID_SIPI_VECTOR | _VALID_SHADOW | _VALID_SMM
    allowed |= _VALID_PAYLOAD if vcpu.kvm.exception_payload else 0
    allowed |= _VALID_TRIPLE_FAULT if vcpu.kvm.triple_fault_event else 0
    if flags & ~allowed:
        raise Refusal(errno.EINVAL, "events.invalid", flags=flags, allowed=allowed)
    if not flags & _VALID_PAYLOAD:
        pending = has_payload = 0
    if (injected or pending) and (nr > 31 or nr == 2):
        raise Refusal(errno.EINVAL, "events.invalid", exception=nr)
    if flags & _VALID_SMM and (smm or smi_pending or smm_inside_nmi):
        raise Refusal(errno.EINVAL, "events.invalid", smm=smm)  # CONFIG_KVM_SMM is off
    old = cpu(vcpu).get_events()
    events = Events(
        exception_injected=bool(injected),
        exception_pending=bool(pending),
        exception_nr=nr,
        exception_error_code=code if has_code else None,
        exception_payload=payload if has_payload else None,
        interrupt_injected=bool(irq),
        interrupt_nr=irq_nr,
        interrupt_soft=bool(soft),
        interrupt_shadow=shadow if flags & _VALID_SHADOW else old.interrupt_shadow,
        nmi_injected=bool(nmi),
        nmi_pending=bool(nmi_pending) if flags & _VALID_NMI_PENDING else old.nmi_pending,
        nmi_masked=bool(nmi_masked),
    )
    cpu(vcpu).set_events(events)
    if flags & _VALID_TRIPLE_FAULT:
        vcpu.triple_fault = bool(triple_fault)
    if flags & _VALID_NMI_PENDING:
        vcpu.interrupts.nmi_pending = False
    if flags & _VALID_SIPI_VECTOR and vcpu.lapic is not None:
        vcpu.lapic.sipi_vector = sipi_vector & 0xFF


def get_lapic(vcpu: Vcpu) -> bytes:
    """struct kvm_lapic_state. Raises: Refusal EINVAL `lapic.none` without one in the kernel."""
    lapic, irqchip = vcpu.lapic, vcpu.kvm.irqchip
    if lapic is None or irqchip is None:
        raise Refusal(errno.EINVAL, "lapic.none", vcpu=vcpu.number)
    return lapic_page.pack(lapic, irqchip.has_32_bit_ids)


def set_lapic(vcpu: Vcpu, data: bytes) -> None:
    """Raises: Refusal EINVAL `lapic.none`; EINVAL `lapic.id`, of an x2APIC whose ID is another's."""
    lapic, irqchip = vcpu.lapic, vcpu.kvm.irqchip
    if lapic is None or irqchip is None:
        raise Refusal(errno.EINVAL, "lapic.none", vcpu=vcpu.number)
    if not lapic_page.unpack(lapic, data, irqchip.has_32_bit_ids):
        raise Refusal(errno.EINVAL, "lapic.id", vcpu=vcpu.number)
    vcpu.interrupts.give_tpr()
