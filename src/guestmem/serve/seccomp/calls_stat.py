"""What our files look like: as anonymous inodes, though they are memfds and sockets."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable

from guestmem.serve.files import GmemFile, ServedFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.calls_open import DEVICES, path_at
from guestmem.serve.seccomp.descriptors import as_int, file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import NATIVE, Result, Tracee, Work
from guestmem.serve.seccomp.user_memory import write_memory
from guestmem.serve.wire import FileKind
from guestmem.uapi.kvm import GUEST_MEMFD_MAGIC

_STAT = struct.Struct("<QQQIIIIQqqqqqqqqq24x")
_STATX = struct.Struct("<IIQIIIHHQQQQ16s16s16s16sIIIIQ104x")
_STATFS = struct.Struct("<qqQQQQQiiqqq32x")
_TIME = struct.Struct("<qI4x")
_STATX_SHOWN = 0x17FF
"""Basic statistics and the mount, no time of birth."""
_KVM_DEVICE = os.makedev(10, 232)
_ANON_INODE_FS, _ST_VALID = 0x09041934, 0x20
_BLOCK = 4096
Blocks = tuple[int, int]
"""st_blksize and st_blocks."""
_EMPTY: Blocks = (_BLOCK, 0)
_MODES = {
    FileKind.KVM: stat.S_IFCHR | 0o660,
    FileKind.VM: 0o600,
    FileKind.VCPU: 0o600,
    FileKind.GMEM: stat.S_IFREG | 0o600,
    FileKind.GUP_TEST: stat.S_IFREG | 0o600,
    FileKind.IOMMU: stat.S_IFCHR | 0o660,
    FileKind.LIVE_UPDATE: stat.S_IFCHR | 0o600,
    FileKind.SESSION: 0o600,
    FileKind.VFIO: stat.S_IFCHR | 0o660,
}


def _found(tracee: Tracee, fd: int) -> os.stat_result:
    """What is behind a file of ours. Raises: OSError."""
    return os.stat(f"/proc/{tracee.tid}/fd/{as_int(fd)}")


async def _with_blocks(file: GmemFile, show: Callable[[Blocks], int | None]) -> Result:
    """Show a file of huge pages, once it is known how many are there."""
    result = show(await file.blocks())
    return NATIVE if result is None else result


def _mount(tracee: Tracee, fd: int) -> int:
    with open(f"/proc/{tracee.tid}/fdinfo/{as_int(fd)}") as info:
        return next((int(line.split()[1]) for line in info if line.startswith("mnt_id:")), 0)


def _fstat(tracee: Tracee, call: SystemCall) -> Work:
    fd, buffer = call.arguments[:2]
    file = file_at(tracee, fd)
    return _show(tracee, fd, file, buffer) if file is not None else None


def _fstatat(tracee: Tracee, call: SystemCall) -> Work:
    fd, path, buffer = call.arguments[:3]
    return _by_fd_or_path(tracee, fd, path, lambda file: _show(tracee, fd, file, buffer))


def _stat_path(tracee: Tracee, call: SystemCall) -> Work:
    return _show(tracee, -1, None, call.arguments[1]) if path_at(tracee, call.arguments[0]) in DEVICES else None


def _by_fd_or_path(tracee: Tracee, fd: int, path: int, show: Callable[[ServedFile | None], Work]) -> Work:
    """A name of a device on a machine that has none; or no name, but a descriptor of ours."""
    name = path_at(tracee, path)
    if name:
        missing = name in DEVICES and not os.path.exists(name)
        return show(None) if missing else None
    file = file_at(tracee, fd)
    return show(file) if file is not None else None


def _show(tracee: Tracee, fd: int, file: ServedFile | None, buffer: int) -> Work:
    """struct stat."""
    if isinstance(file, GmemFile) and file.file.inode.order:
        return _with_blocks(file, lambda blocks: _show_stat(tracee, fd, file, buffer, blocks))
    return _show_stat(tracee, fd, file, buffer)


def _show_stat(tracee: Tracee, fd: int, file: ServedFile | None, buffer: int, blocks: Blocks = _EMPTY) -> int | None:
    kind = FileKind.KVM if file is None else file.kind
    device = _KVM_DEVICE if kind == FileKind.KVM else 0
    if file is None:
        data = _STAT.pack(0, 0, 1, _MODES[kind], 0, 0, 0, device, 0, _BLOCK, *(0,) * 7)
    else:
        try:
            s = _found(tracee, fd)
        except OSError:
            return None
        times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
        seconds = [part for time in times for part in divmod(time, 10**9)]
        owner = (1, _MODES[kind], s.st_uid, s.st_gid, 0)
        data = _STAT.pack(s.st_dev, s.st_ino, *owner, device, s.st_size, *blocks, *seconds)
    return 0 if write_memory(tracee.tid, buffer, data) else -errno.EFAULT


def _statx(tracee: Tracee, call: SystemCall) -> Work:
    fd, path, _, _, buffer = call.arguments[:5]
    return _by_fd_or_path(tracee, fd, path, lambda file: _show_statx(tracee, fd, file, buffer))


def _show_statx(tracee: Tracee, fd: int, file: ServedFile | None, buffer: int) -> Work:
    """struct statx."""
    if isinstance(file, GmemFile) and file.file.inode.order:
        return _with_blocks(file, lambda blocks: _show_more(tracee, fd, file, buffer, blocks))
    return _show_more(tracee, fd, file, buffer)


def _show_more(tracee: Tracee, fd: int, file: ServedFile | None, buffer: int, blocks: Blocks = _EMPTY) -> int | None:
    kind = FileKind.KVM if file is None else file.kind
    device = _KVM_DEVICE if kind == FileKind.KVM else 0
    devices = (os.major(device), os.minor(device))
    if file is None:
        head = (_STATX_SHOWN, _BLOCK, 0, 1, 0, 0, _MODES[kind], 0, 0, 0, 0, 0)
        data = _STATX.pack(*head, *(bytes(16),) * 4, *devices, 0, 0, 0)
    else:
        try:
            s = _found(tracee, fd)
        except OSError:
            return None
        none, access, change, modify = (
            _TIME.pack(*divmod(time, 10**9)) for time in (0, s.st_atime_ns, s.st_ctime_ns, s.st_mtime_ns)
        )
        size, count = blocks
        head = (_STATX_SHOWN, size, 0, 1, s.st_uid, s.st_gid, _MODES[kind], 0, s.st_ino, s.st_size, count, 0)
        place = (os.major(s.st_dev), os.minor(s.st_dev), _mount(tracee, fd))
        data = _STATX.pack(*head, access, none, change, modify, *devices, *place)
    return 0 if write_memory(tracee.tid, buffer, data) else -errno.EFAULT


def _fstatfs(tracee: Tracee, call: SystemCall) -> Work:
    fd, buffer = call.arguments[:2]
    file = file_at(tracee, fd)
    return _show_statfs(tracee, file, buffer) if file is not None else None


def _show_statfs(tracee: Tracee, file: ServedFile, buffer: int) -> int:
    own = isinstance(file, GmemFile) and tracee.supervisor.server.host.level.own_file_system
    kind = GUEST_MEMFD_MAGIC if own else _ANON_INODE_FS
    data = _STATFS.pack(kind, _BLOCK, 0, 0, 0, 0, 0, 0, 0, 255, _BLOCK, _ST_VALID)
    return 0 if write_memory(tracee.tid, buffer, data) else -errno.EFAULT


TABLE = {
    Nr.FSTAT: _fstat,
    Nr.NEWFSTATAT: _fstatat,
    Nr.STAT: _stat_path,
    Nr.LSTAT: _stat_path,
    Nr.STATX: _statx,
    Nr.FSTATFS: _fstatfs,
}
