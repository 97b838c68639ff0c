"""open(), and what else takes a path: our devices, and names under /proc that lead to our files."""

from __future__ import annotations

import errno
import os

from guestmem.serve.files import GmemFile, ServedFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.calls_ioctl import give
from guestmem.serve.seccomp.descriptors import file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import Result, Tracee, Work
from guestmem.serve.seccomp.user_memory import read_memory, read_string, write_memory
from guestmem.serve.wire import (
    OPEN_GUP_TEST,
    OPEN_IOMMU,
    OPEN_KVM,
    OPEN_LIVE_UPDATE,
    OPEN_VFIO,
    VFIO_DEVICES,
    FileKind,
    Op,
)

DEVICES = {
    b"/dev/kvm": OPEN_KVM,
    b"/sys/kernel/debug/gup_test": OPEN_GUP_TEST,
    b"/dev/iommu": OPEN_IOMMU,
    b"/dev/liveupdate": OPEN_LIVE_UPDATE,
    **{b"/dev/vfio/devices/vfio%d" % number: OPEN_VFIO + number for number in range(VFIO_DEVICES)},
}
_O_PATH = 0o10000000
_NAMES = {
    FileKind.KVM: b"/dev/kvm",
    FileKind.VM: b"anon_inode:kvm-vm",
    FileKind.VCPU: b"anon_inode:kvm-vcpu:0",
    FileKind.GMEM: b"anon_inode:[kvm-gmem]",
    FileKind.GUP_TEST: b"/sys/kernel/debug/gup_test",
    FileKind.IOMMU: b"/dev/iommu",
    FileKind.LIVE_UPDATE: b"/dev/liveupdate",
    FileKind.SESSION: b"anon_inode:[luo_session]",
    FileKind.VFIO: b"/dev/vfio/devices/vfio0",
}


def path_at(tracee: Tracee, address: int) -> bytes:
    """A path argument; b"" for one that cannot be read, which the kernel then says itself."""
    return read_string(tracee.tid, address) or b""


def _named_file(tracee: Tracee, path: bytes) -> ServedFile | None:
    """The file of ours that a name of one of the process's own descriptors leads to."""
    directory, _, number = path.rpartition(b"/")
    own = (b"/dev/fd", b"/proc/self/fd", b"/proc/thread-self/fd", b"/proc/%d/fd" % tracee.tgid)
    return file_at(tracee, int(number)) if directory in own and number.isdigit() else None


def _open_path(tracee: Tracee, address: int, flags: int) -> Work:
    path = path_at(tracee, address)
    if not path.startswith((b"/dev/", b"/proc/", b"/sys/")) or flags & _O_PATH:
        return None
    if path in DEVICES:
        return _open_device(tracee, DEVICES[path], bool(flags & os.O_CLOEXEC))
    return -errno.ENXIO if _named_file(tracee, path) is not None else None


async def _open_device(tracee: Tracee, device: int, cloexec: bool) -> Result:
    reply = await tracee.request(Op.OPEN, a=device)
    return await give(tracee, reply._replace(a=0 if cloexec else 1))


def _open(tracee: Tracee, call: SystemCall) -> Work:
    return _open_path(tracee, call.arguments[0], call.arguments[1])


def _openat(tracee: Tracee, call: SystemCall) -> Work:
    return _open_path(tracee, call.arguments[1], call.arguments[2])


def _openat2(tracee: Tracee, call: SystemCall) -> Work:
    flags = read_memory(tracee.tid, call.arguments[2], 8)
    return _open_path(tracee, call.arguments[1], int.from_bytes(flags, "little")) if flags is not None else None


def _access(tracee: Tracee, call: SystemCall) -> Work:
    """Whoever runs under us may use the device, whether the machine has one or not."""
    address = call.arguments[0 if call.number == Nr.ACCESS else 1]
    return 0 if path_at(tracee, address) in DEVICES else None


def _readlink(tracee: Tracee, call: SystemCall) -> Work:
    path, buffer, size = call.arguments[:3] if call.number == Nr.READLINK else call.arguments[1:4]
    file = _named_file(tracee, path_at(tracee, path))
    return _link(tracee, file, buffer, size & 0xFFFF_FFFF) if file is not None else None


def _link(tracee: Tracee, file: ServedFile, buffer: int, size: int) -> int:
    name = _NAMES[file.kind][:size]
    if not name:
        return -errno.EINVAL
    return len(name) if write_memory(tracee.tid, buffer, name) else -errno.EFAULT


def _truncate(tracee: Tracee, call: SystemCall) -> Work:
    file = _named_file(tracee, path_at(tracee, call.arguments[0]))
    return -errno.EINVAL if isinstance(file, GmemFile) else None


TABLE = {
    Nr.TRUNCATE: _truncate,
    Nr.OPEN: _open,
    Nr.OPENAT: _openat,
    Nr.OPENAT2: _openat2,
    Nr.ACCESS: _access,
    Nr.FACCESSAT: _access,
    Nr.FACCESSAT2: _access,
    Nr.READLINK: _readlink,
    Nr.READLINKAT: _readlink,
}
