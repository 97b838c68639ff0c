"""ioctls of a vCPU: KVM_RUN and the registers.

Every one of them takes the vCPU's mutex, so a thread that asks while another runs the vCPU waits, as in the kernel.
Source: virt/kvm/kvm_main.c kvm_vcpu_ioctl, arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable

from guestmem.cpu.msrs import TSC_KHZ
from guestmem.kvm.exits import LeftExit, MemoryFaultExit
from guestmem.kvm.ioctl import encrypt_vcpu, pre_fault
from guestmem.kvm.vcpu import Vcpu
from guestmem.serve import vcpu_state
from guestmem.serve.call import Call, CallFiles, KvmCaller
from guestmem.serve.cpuid_list import read_cpuid, write_cpuid
from guestmem.serve.files import VcpuFile
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_MSRS_HEADER = struct.Struct("<II")
_MSR = struct.Struct("<IIQ")
_MAX_MSRS = 256
_MP_STATES = range(10)


def _file(call: Call) -> VcpuFile:
    assert isinstance(call.file, VcpuFile)
    return call.file


def _run_at_once(file: VcpuFile, argument: int) -> bytes | None:
    """KVM_RUN as far as it goes without a task; None if that was not all of it. See Vcpu.run_at_once."""
    vcpu, run = file.vcpu, file.run
    if argument or run.immediate_exit or run.request_interrupt_window:
        return None
    if vcpu.unanswered is not None:
        run.answer(vcpu.unanswered)
    vcpu.immediate_exit = False
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
    run.answer(vcpu.unanswered)
    vcpu.immediate_exit = run.immediate_exit
    vcpu_state.cpu(vcpu).request_interrupt_window = run.request_interrupt_window
    if file.cpu is not None and call.request.c:
        file.cpu.came_with_stop = True
        vcpu.immediate_exit = False  # it was looked at before the guest was entered
    try:
        exit_ = await vcpu.run()
    finally:
        if file.cpu is not None:
            file.cpu.allow_direct()
    if isinstance(exit_, LeftExit):
        return 0
    error = run.write(exit_)
    vcpu_state.write_run_state(run, vcpu)
    if error:
        if isinstance(exit_, MemoryFaultExit):
            raise exit_.refusal
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
        vcpu.cpuid = table
        vcpu.engine.set_cpuid(table)
    return 0


async def _get_cpuid2(call: Call, argument: int) -> int:
    await write_cpuid(call, argument, _file(call).vcpu.cpuid)
    return 0


async def _msr_list(call: Call, argument: int) -> list[tuple[int, int]]:
    """struct kvm_msrs. Raises: Refusal E2BIG `list.too_long`."""
    memory = call.client.memory
    count, _ = _MSRS_HEADER.unpack(await memory.copy_from_user(argument, _MSRS_HEADER.size))
    if count >= _MAX_MSRS:
        raise Refusal(errno.E2BIG, "list.too_long", count=count, limit=_MAX_MSRS)
    data = await memory.copy_from_user(argument + _MSRS_HEADER.size, count * _MSR.size)
    return [(index, value) for index, _, value in _MSR.iter_unpack(data)]


async def _get_msrs(call: Call, argument: int) -> int:
    """How many were read: the first that is unknown ends it."""
    asked = await _msr_list(call, argument)
    vcpu = _file(call).vcpu
    found = b""
    done = 0
    async with vcpu.mutex:
        for index, _ in asked:
            value = vcpu_state.cpu(vcpu).get_msr(index)
            if value is None:
                break
            found += _MSR.pack(index, 0, value)
            done += 1
    await call.client.memory.copy_to_user(argument + _MSRS_HEADER.size, found)
    return done


async def _set_msrs(call: Call, argument: int) -> int:
    wanted = await _msr_list(call, argument)
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        for done, (index, value) in enumerate(wanted):
            if not vcpu_state.cpu(vcpu).set_msr(index, value):
                return done
    return len(wanted)


async def _interrupt(call: Call, argument: int) -> int:
    """Raises: Refusal EINVAL `interrupt.vector`; ENXIO `interrupt.irqchip` where the controller is in the kernel."""
    (vector,) = struct.unpack("<I", await call.client.memory.copy_from_user(argument, 4))
    vcpu = _file(call).vcpu
    if vector > 255:
        raise Refusal(errno.EINVAL, "interrupt.vector", vector=vector)
    if vcpu.kvm.irqchip is not None:
        raise Refusal(errno.ENXIO, "interrupt.irqchip", vector=vector)
    async with vcpu.mutex:
        vcpu_state.cpu(vcpu).queue_interrupt(vector)
    return 0


async def _nmi(call: Call, argument: int) -> int:
    vcpu = _file(call).vcpu
    async with vcpu.mutex:
        vcpu_state.cpu(vcpu).queue_nmi()
    return 0


def _get_mp_state(vcpu: Vcpu) -> bytes:
    return struct.pack("<I", vcpu.mp_state)


def _set_mp_state(vcpu: Vcpu, data: bytes) -> None:
    (state,) = struct.unpack("<I", data)
    if state not in _MP_STATES or (state and not vcpu.kvm.apic_in_kernel):
        raise Refusal(errno.EINVAL, "vcpu.mp_state", mp_state=state)
    vcpu.mp_state = state


async def _pre_fault(call: Call, argument: int) -> int:
    return await pre_fault(KvmCaller(call.client.memory, CallFiles(call)), _file(call).vcpu, argument)


async def _encrypt(call: Call, argument: int) -> int:
    return await encrypt_vcpu(KvmCaller(call.client.memory, CallFiles(call)), _file(call).vcpu, argument)


async def _get_tsc_khz(call: Call, argument: int) -> int:
    return TSC_KHZ


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
    uapi.KVM_KVMCLOCK_CTRL: _accept,
    uapi.KVM_SET_TSC_KHZ: _accept,
    uapi.KVM_GET_TSC_KHZ: _get_tsc_khz,
}
