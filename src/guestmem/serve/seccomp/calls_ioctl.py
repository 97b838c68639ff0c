"""ioctl(): what it is all for."""

from __future__ import annotations

import errno

from guestmem.serve.channel import close_all
from guestmem.serve.files import GmemFile, IommuFile, ServedFile, VcpuFile, VfioFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.descriptors import file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import Reply, Result, Tracee, Work
from guestmem.serve.seccomp.user_memory import read_memory, write_memory
from guestmem.serve.vcpu_ioctls import AT_ONCE
from guestmem.serve.wire import FD_IN_ARGUMENT, KEEP_ON_EXEC, Op, Request
from guestmem.uapi.kvm import KVM_RUN, KVM_SET_SIGNAL_MASK
from guestmem.uapi.liveupdate import FD_AT

_ANY_FILE = (0x5451, 0x5450, 0x5421, 0x5452, 0x2, 0xC020660B)
"""FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC, FIGETBSZ, FS_IOC_FIEMAP: the kernel answers them for every file."""
_TYPES_OF_GMEM = (0xAE, 0xAF)
_UFFDIO_REGISTER = 0xC020AA00
_IOC_WRITE = 1 << 30
_LARGEST_STRUCTURE = 256
_UNBLOCKABLE = 1 << 8 | 1 << 18
"""SIGKILL, SIGSTOP."""


def _ioctl(tracee: Tracee, call: SystemCall) -> Work:
    fd, request, argument = call.arguments[0], call.arguments[1] & 0xFFFF_FFFF, call.arguments[2]
    if request == _UFFDIO_REGISTER:
        return _register(tracee, argument)
    if request in _ANY_FILE:
        return None
    file = file_at(tracee, fd)
    if file is None:
        return None
    if isinstance(file, VcpuFile):
        if request == KVM_SET_SIGNAL_MASK:
            return _set_signal_mask(tracee, file, argument)
        if (done := _done_at_once(tracee, file, request, argument)) is not None:
            return done
        if request == KVM_RUN:
            return _run(tracee, file, argument)
    return _serve(tracee, file, request, argument)


def _done_at_once(tracee: Tracee, file: VcpuFile, request: int, argument: int) -> int | None:
    """What VMMs do all the time mostly needs no task; None if this does."""
    at_once = AT_ONCE.get(request)
    if at_once is None or file.owner is not tracee.client or file.vcpu.kvm.dead:
        return None
    if file.inode_number in tracee.supervisor.masks:
        return None
    payload = at_once(file, argument)
    if payload is None:
        return None
    tracee.supervisor.server.report.count(Request(Op.IOCTL, 0, file.inode_number, request, argument, 0, 0, b""))
    return 0 if write_memory(tracee.tid, argument, payload) else -errno.EFAULT


async def _serve(tracee: Tracee, file: ServedFile, request: int, argument: int) -> Result:
    if isinstance(file, GmemFile) and request >> 8 & 0xFF not in _TYPES_OF_GMEM:
        return -errno.ENOTTY
    payload: bytes | None = b""
    if isinstance(file, IommuFile | VfioFile):  # their structures say their size themselves
        size = int.from_bytes(read_memory(tracee.tid, argument, 4) or b"", "little")
        payload = read_memory(tracee.tid, argument, size) if size <= _LARGEST_STRUCTURE else b""
    elif request & _IOC_WRITE:
        payload = read_memory(tracee.tid, argument, request >> 16 & 0x3FFF)
        if payload is None:
            return -errno.EFAULT
    reply = await tracee.request(Op.IOCTL, file, request, argument, payload=payload or b"")
    return await give(tracee, reply, argument)


async def give(tracee: Tracee, reply: Reply, argument: int = 0) -> int:
    """The server's answer becomes the call's: bytes to the argument, a descriptor into the client's table."""
    if reply.payload:
        await tracee.process.thawed()
        if not write_memory(tracee.tid, argument, reply.payload):
            close_all(reply.fds)
            return -errno.EFAULT
    if reply.error:
        close_all(reply.fds)
        return -reply.error
    if reply.fds:
        number = await tracee.install(reply.fds[0], cloexec=not reply.a & KEEP_ON_EXEC)
        if number < 0 or not reply.a & FD_IN_ARGUMENT:
            return number
        await tracee.process.thawed()
        if not write_memory(tracee.tid, argument + FD_AT, number.to_bytes(4, "little")):
            return -errno.EFAULT
    return reply.value


def _register(tracee: Tracee, argument: int) -> int | None:
    """The client's own userfaultfd: a guest_memfd's mapping cannot be registered with one."""
    found = read_memory(tracee.tid, argument, 16)
    if found is None:
        return None
    start, size = (int.from_bytes(found[at : at + 8], "little") for at in (0, 8))
    return -errno.EINVAL if tracee.process.areas_touch(start, size, gmem=True) else None


# KVM_RUN: a signal ends it


async def _run(tracee: Tracee, file: VcpuFile, argument: int) -> Result:
    if file.owner is not tracee.client:
        return -errno.EIO
    tracee.interruptible = True
    mask = tracee.supervisor.masks.get(file.inode_number)
    if mask is None:
        reply = await tracee.request(Op.IOCTL, file, KVM_RUN, argument)
        return -reply.error if reply.error else reply.value
    # The vCPU's mask takes the place of the thread's. A signal that only the former lets through ends the run and, as
    # the thread's own is back when it would be delivered, stays pending: the kernel puts it back.
    async with tracee.held():
        own = tracee.swap_signal_mask(mask)
    reply = await tracee.request(Op.IOCTL, file, KVM_RUN, argument)
    await tracee.hold()
    tracee.swap_signal_mask(own)
    tracee.release_at_end()
    return -reply.error if reply.error else reply.value


def _set_signal_mask(tracee: Tracee, file: VcpuFile, argument: int) -> int:
    """struct kvm_signal_mask, or NULL for none: the checks of kvm_vcpu_ioctl()."""
    if file.owner is not tracee.client:
        return -errno.EIO
    masks = tracee.supervisor.masks
    if not argument:
        masks.pop(file.inode_number, None)
        return 0
    length = read_memory(tracee.tid, argument, 4)
    if length is None:
        return -errno.EFAULT
    if int.from_bytes(length, "little") != 8:
        return -errno.EINVAL
    mask = read_memory(tracee.tid, argument + 4, 8)
    if mask is None:
        return -errno.EFAULT
    masks[file.inode_number] = int.from_bytes(mask, "little") & ~_UNBLOCKABLE
    return 0


TABLE = {Nr.IOCTL: _ioctl}
