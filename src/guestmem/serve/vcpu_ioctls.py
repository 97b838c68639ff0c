"""ioctls of a vCPU: KVM_RUN and the registers.

Every one of them takes the vCPU's mutex, so a thread that asks while another runs the vCPU waits, as in the kernel.
Source: virt/kvm/kvm_main.c kvm_vcpu_ioctl, arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable

from guestmem.kvm.exits import MemoryFaultExit, UninitializedExit
from guestmem.kvm.ioctl import encrypt_vcpu, pre_fault
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vcpu_msrs import get_msr, set_msr
from guestmem.serve import debug_ioctls, mce_ioctls, sync_regs, tsc_ioctls, vcpu_state
from guestmem.serve.call import Call, CallFiles, KvmCaller
from guestmem.serve.cpuid_list import read_cpuid, write_cpuid
from guestmem.serve.enable_cap import enable_vcpu_cap
from guestmem.serve.files import VcpuFile
from guestmem.serve.msr_list import read_msrs, write_msrs
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_MP_STATES = (
    uapi.KVM_MP_STATE_RUNNABLE,
    uapi.KVM_MP_STATE_UNINITIALIZED,
    uapi.KVM_MP_STATE_INIT_RECEIVED,
    uapi.KVM_MP_STATE_HALTED,
    uapi.KVM_MP_STATE_SIPI_RECEIVED,
    uapi.KVM_MP_STATE_AP_RESET_HOLD,
)


def _file(call: Call) -> VcpuFile:
    assert isinstance(call.file, VcpuFile)
    return call.file


def _run_at_once(file: VcpuFile, argument: int) -> bytes | None:
    """KVM_RUN as far as it goes without a task; None if that was not all of it. See Vcpu.run_at_once."""
    vcpu, run = file.vcpu, file.run
    if argument or run.immediate_exit or run.request_interrupt_window or vcpu.interrupts.window_wanted:
        return None
    if sync_regs.are_asked_for(run):
        return None
    if vcpu.unanswered is not None:
        run.answer(vcpu.unanswered)
    vcpu.immediate_exit = False
    vcpu.interrupts.set_cr8(run.cr8)
    exit_ = vcpu.run_at_once()
    if exit_ is None:
        return None
    run.write(exit_)
    vcpu_state.write_run_state(run, vcpu)
    return b""


async def _run(call: Call, argument: int) -> int:
    """KVM_RUN. Raises: Refusal EINTR `run.interrupted`; EFAULT, EHWPOISON with an exit that says where; EINVAL."""
    file = _file(call)
    if argument:
        raise Refusal(errno.EINVAL, "ioctl.argument", argument=argument)
    vcpu, run = file.vcpu, file.run
    if sync_regs.are_asked_for(run):
        async with vcpu.mutex:
            sync_regs.take(run, vcpu)
    run.answer(vcpu.unanswered)
    vcpu.immediate_exit = run.immediate_exit
    vcpu.interrupts.want_window(run.request_interrupt_window)
    vcpu.interrupts.set_cr8(run.cr8)
    exit_ = await vcpu.run()
    error = run.write(exit_)
    vcpu_state.write_run_state(run, vcpu)
    if sync_regs.are_asked_for(run):
        sync_regs.fill(run, vcpu)
    if error:
        if isinstance(exit_, MemoryFaultExit):
            raise exit_.refusal
        if isinstance(exit_, UninitializedExit):
            raise Refusal(errno.EAGAIN, "run.uninitialized", vcpu=vcpu.number)
        raise Refusal(errno.EINTR, "run.interrupted", vcpu=vcpu.number)
    return 0


def _reader(pack: Callable[[Vcpu], bytes]) -> Callable[[Call, int], Awaitable[int]]:
    """The handler of a GET: what `pack` gives goes to the argument."""

    async def get(call: Call, argument: int) -> int:
        vcpu = _file(call).vcpu
        async with vcpu.mutex:
            data = pack(vcpu)
        await call.client.memory.copy_to_user(argument, data)
        return 0

    return get


def _writer(size: int, unpack: Callable[[Vcpu, bytes], None]) -> Callable[[Call, int], Awaitable[int]]:
    """The handler of a SET: `size` bytes of the argument go to `unpack`."""

    async def set_(call: Call, argument: int) -> int:
        data = await call.client.memory.copy_from_user(argument, size)
        vcpu = _file(call).vcpu
        async with vcpu.mutex:
            unpack(vcpu, data)
        return 0

    return set_


async def _set_cpuid2(call: Call, argument: int) -> int:
    table = await read_cpuid(call, argument)
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        vcpu.set_cpuid(table)
    return 0


async def _get_cpuid2(call: Call, argument: int) -> int:
    await write_cpuid(call, argument, _file(call).vcpu.cpuid)
    return 0


async def _get_msrs(call: Call, argument: int) -> int:
    """How many were read: the first that is unknown ends it."""
    asked = await read_msrs(call, argument)
    vcpu = _file(call).vcpu
    found = []
    async with vcpu.mutex:
        for index, _ in asked:
            value = get_msr(vcpu, index)
            if value is None:
                break
            found.append((index, value))
    return await write_msrs(call, argument, found)


async def _set_msrs(call: Call, argument: int) -> int:
    wanted = await read_msrs(call, argument)
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        for done, (index, value) in enumerate(wanted):
            if not set_msr(vcpu, index, value):
                return done
    return len(wanted)


async def _interrupt(call: Call, argument: int) -> int:
    """To the guest at once, or to LINT0 of an APIC in the kernel, as the VMM's 8259A would.

    Raises: Refusal EINVAL `interrupt.vector`; ENXIO `interrupt.irqchip` where the 8259A is in the kernel; EEXIST
    `interrupt.pending`.
    """
    (vector,) = struct.unpack("<I", await call.client.memory.copy_from_user(argument, 4))
    vcpu = _file(call).vcpu
    if vector > 255:
        raise Refusal(errno.EINVAL, "interrupt.vector", vector=vector)
    async with vcpu.mutex:
        if vcpu.kvm.irqchip is None:
            vcpu_state.cpu(vcpu).queue_interrupt(vector)
            return 0
        if vcpu.kvm.irqchip.pic is not None:
            raise Refusal(errno.ENXIO, "interrupt.irqchip", vector=vector)
        if vcpu.interrupts.external_vector is not None:
            raise Refusal(errno.EEXIST, "interrupt.pending", vector=vector)
        vcpu.interrupts.external_vector = vector
    return 0


async def _nmi(call: Call, argument: int) -> int:
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        vcpu.interrupts.inject_nmi()
    return 0


def _get_mp_state(vcpu: Vcpu) -> bytes:
    """Source: kvm_arch_vcpu_ioctl_get_mpstate."""
    vcpu.interrupts.accept_start_events()
    return struct.pack("<I", vcpu.mp_state)


def _set_mp_state(vcpu: Vcpu, data: bytes) -> None:
    """SIPI_RECEIVED was a state once: now it is INIT_RECEIVED and a SIPI that waits. Source:
    kvm_arch_vcpu_ioctl_set_mpstate."""
    (state,) = struct.unpack("<I", data)
    lapic = vcpu.lapic
    if state not in _MP_STATES or (state and lapic is None):
        raise Refusal(errno.EINVAL, "vcpu.mp_state", mp_state=state)
    if lapic is not None and state == uapi.KVM_MP_STATE_SIPI_RECEIVED:
        lapic.sipi_pending, state = True, uapi.KVM_MP_STATE_INIT_RECEIVED
    vcpu.mp_state = state
    vcpu.interrupts.kick()


async def _pre_fault(call: Call, argument: int) -> int:
    return await pre_fault(KvmCaller(call.client.memory, CallFiles(call)), _file(call).vcpu, argument)


async def _encrypt(call: Call, argument: int) -> int:
    return await encrypt_vcpu(KvmCaller(call.client.memory, CallFiles(call)), _file(call).vcpu, argument)


async def _kvmclock_ctrl(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `kvmclock.off`."""
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        if not vcpu.clock.pause():
            raise Refusal(errno.EINVAL, "kvmclock.off", vcpu=vcpu.number)
    return 0


async def _report_tpr_accesses(call: Call, argument: int) -> int:
    """Accesses to the TPR are exits where hardware cannot do without: not here. Raises: Refusal EINVAL
    `ioctl.argument`. Source: vcpu_ioctl_tpr_access_reporting."""
    data = await call.client.memory.copy_from_user(argument, 40)
    _, flags = struct.unpack_from("<II", data)
    if flags:
        raise Refusal(errno.EINVAL, "ioctl.argument", flags=flags)
    return 0


async def _set_vapic_addr(call: Call, argument: int) -> int:
    """A page in which old guests of KVM's kvmvapic option ROM keep the TPR. Raises: Refusal EINVAL `lapic.none`."""
    await call.client.memory.copy_from_user(argument, 8)
    if _file(call).vcpu.lapic is None:
        raise Refusal(errno.EINVAL, "lapic.none", vcpu=_file(call).vcpu.number)
    return 0


async def _accept(call: Call, argument: int) -> int:
    """Nothing that we do depends on it. (The shim does what KVM_SET_SIGNAL_MASK asks.)"""
    return 0


def _get_regs_at_once(file: VcpuFile, argument: int) -> bytes | None:
    """KVM_GET_REGS of a vCPU that nobody runs."""
    return vcpu_state.get_regs(file.vcpu) if file.vcpu.mutex.owner is None else None


AT_ONCE: dict[int, Callable[[VcpuFile, int], bytes | None]] = {
    uapi.KVM_RUN: _run_at_once,
    uapi.KVM_GET_REGS: _get_regs_at_once,
}
"""What VMMs call all the time, done without a task: the bytes of the answer, or None where it does need one."""

TABLE = {
    uapi.KVM_RUN: _run,
    uapi.KVM_GET_REGS: _reader(vcpu_state.get_regs),
    uapi.KVM_SET_REGS: _writer(144, vcpu_state.set_regs),
    uapi.KVM_GET_SREGS: _reader(vcpu_state.get_sregs),
    uapi.KVM_SET_SREGS: _writer(312, vcpu_state.set_sregs),
    uapi.KVM_GET_FPU: _reader(vcpu_state.get_fpu),
    uapi.KVM_SET_FPU: _writer(416, vcpu_state.set_fpu),
    uapi.KVM_GET_XSAVE: _reader(vcpu_state.get_xsave),
    uapi.KVM_SET_XSAVE: _writer(4096, vcpu_state.set_xsave),
    uapi.KVM_GET_XCRS: _reader(vcpu_state.get_xcrs),
    uapi.KVM_SET_XCRS: _writer(392, vcpu_state.set_xcrs),
    uapi.KVM_GET_DEBUGREGS: _reader(vcpu_state.get_debugregs),
    uapi.KVM_SET_DEBUGREGS: _writer(128, vcpu_state.set_debugregs),
    uapi.KVM_GET_VCPU_EVENTS: _reader(vcpu_state.get_events),
    uapi.KVM_SET_VCPU_EVENTS: _writer(64, vcpu_state.set_events),
    uapi.KVM_GET_LAPIC: _reader(vcpu_state.get_lapic),
    uapi.KVM_SET_LAPIC: _writer(1024, vcpu_state.set_lapic),
    uapi.KVM_GET_MP_STATE: _reader(_get_mp_state),
    uapi.KVM_SET_MP_STATE: _writer(4, _set_mp_state),
    uapi.KVM_SET_CPUID2: _set_cpuid2,
    uapi.KVM_GET_CPUID2: _get_cpuid2,
    uapi.KVM_GET_MSRS: _get_msrs,
    uapi.KVM_SET_MSRS: _set_msrs,
    uapi.KVM_INTERRUPT: _interrupt,
    uapi.KVM_NMI: _nmi,
    uapi.KVM_PRE_FAULT_MEMORY: _pre_fault,
    uapi.KVM_MEMORY_ENCRYPT_OP: _encrypt,
    uapi.KVM_SET_SIGNAL_MASK: _accept,
    uapi.KVM_KVMCLOCK_CTRL: _kvmclock_ctrl,
    uapi.KVM_SET_GUEST_DEBUG: debug_ioctls.set_guest_debug,
    uapi.KVM_TRANSLATE: debug_ioctls.translate,
    uapi.KVM_X86_SETUP_MCE: _writer(8, mce_ioctls.setup_mce),
    uapi.KVM_X86_SET_MCE: _writer(64, mce_ioctls.set_mce),
    uapi.KVM_GET_SREGS2: _reader(vcpu_state.get_sregs2),
    uapi.KVM_SET_SREGS2: _writer(320, vcpu_state.set_sregs2),
    uapi.KVM_GET_XSAVE2: _reader(vcpu_state.get_xsave),
    uapi.KVM_ENABLE_CAP: enable_vcpu_cap,
    uapi.KVM_TPR_ACCESS_REPORTING: _report_tpr_accesses,
    uapi.KVM_SET_VAPIC_ADDR: _set_vapic_addr,
    **tsc_ioctls.OF_A_VCPU,
}
