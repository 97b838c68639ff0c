"""KVM_CREATE_DEVICE. On x86 there is one kind, VFIO: it tells KVM which VFIO files a guest's devices come from.

Such a file changes nothing here, since DMA of devices is the IOMMU's and is coherent. Source: virt/kvm/kvm_main.c
kvm_ioctl_create_device; virt/kvm/vfio.c.
"""

from __future__ import annotations

import errno
import struct

from guestmem.serve.call import Call
from guestmem.serve.files import KvmVfioFile, VfioFile, VmFile
from guestmem.serve.wire import FD_IN_ARGUMENT
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

_CREATE = struct.Struct("<III")  # type, fd, flags
_ATTR = struct.Struct("<IIQQ")  # flags, group, attr, addr
_FILE, _FILE_ADD, _FILE_DEL = 1, 1, 2


async def create_device(call: Call, argument: int) -> int:
    """Raises: Refusal ENODEV `device.type`; EBUSY `device.exists`, as a VM has one VFIO device."""
    assert isinstance(call.file, VmFile)
    kind, _, flags = _CREATE.unpack(await call.client.memory.copy_from_user(argument, _CREATE.size))
    if kind != uapi.KVM_DEV_TYPE_VFIO:
        raise Refusal(errno.ENODEV, "device.type", type=kind)
    if flags & uapi.KVM_CREATE_DEVICE_TEST:
        return 0
    if call.file.has_vfio_device:
        raise Refusal(errno.EBUSY, "device.exists", type=kind)
    call.file.has_vfio_device = True
    call.file.kvm.get()
    call.give(call.server.add_token(KvmVfioFile(call.client, call.file)))
    call.a |= FD_IN_ARGUMENT
    return 0


async def ioctl(call: Call, file: KvmVfioFile, request: int, argument: int) -> int:
    """KVM_SET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR. Raises: Refusal ENXIO `device_attr.unknown`; EBADF `fd.not_open`;
    EINVAL `device.no_vfio`, of a file that is none; EEXIST `device.file_exists`; ENOENT `device.no_file`."""
    memory = call.client.memory
    if request not in (uapi.KVM_SET_DEVICE_ATTR, uapi.KVM_HAS_DEVICE_ATTR):
        raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="VFIO device of KVM")
    _, group, attribute, address = _ATTR.unpack(await memory.copy_from_user(argument, _ATTR.size))
    if group != _FILE or attribute not in (_FILE_ADD, _FILE_DEL):
        raise Refusal(errno.ENXIO, "device_attr.unknown", group=group, attribute=attribute)
    if request == uapi.KVM_HAS_DEVICE_ATTR:
        return 0
    (number,) = struct.unpack("<i", await memory.copy_from_user(address, 4))
    found = await call.descriptor(number)
    if not isinstance(found, VfioFile):
        raise Refusal(errno.EINVAL, "device.no_vfio", fd=number)
    if attribute == _FILE_ADD:
        if found.inode_number in file.vfio_files:
            raise Refusal(errno.EEXIST, "device.file_exists", fd=number)
        file.vfio_files.add(found.inode_number)
        return 0
    if found.inode_number not in file.vfio_files:
        raise Refusal(errno.ENOENT, "device.no_file", fd=number)
    file.vfio_files.remove(found.inode_number)
    return 0
