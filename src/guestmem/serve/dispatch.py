"""ioctls: from a request number to the function that does it, one table for each kind of file.

Every handler takes the call and the ioctl's argument (a number or a user address) and returns the ioctl's value. What
is not in a table is ENOTTY on a VM or a guest_memfd and EINVAL on a vCPU and /dev/kvm, as in the kernel, and is listed
in the report.

Source: virt/kvm/kvm_main.c kvm_dev_ioctl, kvm_vm_ioctl, kvm_vcpu_ioctl; golden_6_18.md rows K1 to K13, G44.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from guestmem.iommu import ioctl as iommu_ioctl
from guestmem.kvm.ioctl import gmem_ioctl
from guestmem.kvm.vm import Kvm
from guestmem.serve import system_ioctls, vcpu_ioctls, vm_ioctls
from guestmem.serve.call import Call
from guestmem.serve.files import GmemFile, IommuFile, KvmDevice, VcpuFile, VfioFile, VmFile
from guestmem.serve.gup_test import GupTest
from guestmem.serve.iommu_caller import IommuCaller
from guestmem.serve.liveupdate import LiveUpdateFile, SessionFile
from guestmem.trace import Refusal

IoctlHandler: TypeAlias = Callable[[Call, int], Awaitable[int]]
Table: TypeAlias = Mapping[int, IoctlHandler]

_IOC_READ = 2
_UNKNOWN = {"/dev/kvm": errno.EINVAL, "VM": errno.ENOTTY, "vCPU": errno.EINVAL}


async def ioctl(call: Call) -> int:
    """The wire's IOCTL. Raises: Refusal `ioctl.unknown`, `ioctl.other_mm`; what the handler refuses."""
    request, argument = call.request.a & 0xFFFF_FFFF, call.request.b
    call.begin_ioctl(request >> 16 & 0x3FFF, request >> 30)
    file = call.file
    match file:
        case KvmDevice():
            return await _look_up(system_ioctls.TABLE, request, "/dev/kvm")(call, argument)
        case VmFile():
            _check_owner(call, file.kvm)
            result = await _look_up(vm_ioctls.TABLE, request, "VM")(call, argument)
            if file.kvm.stage2.remote is not None:
                file.kvm.stage2.remote.review()
            return result
        case VcpuFile():
            _check_owner(call, file.vcpu.kvm)
            return await _look_up(vcpu_ioctls.TABLE, request, "vCPU")(call, argument)
        case GmemFile():
            return await gmem_ioctl(call.client.memory, file.file, request, argument)
        case IommuFile():
            call.begin_ioctl(len(call.request.payload), _IOC_READ)
            return await iommu_ioctl.ioctl(IommuCaller(call), file.iommufd, request, argument)
        case VfioFile():
            call.begin_ioctl(len(call.request.payload), _IOC_READ)
            return await file.vfio.ioctl(IommuCaller(call), request, argument)
        case LiveUpdateFile() | SessionFile():
            return await file.ioctl(call, request, argument)
        case GupTest():
            return await file.ioctl(call, request, argument)
        case _:
            raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="other file")


def _look_up(table: Table, request: int, on: str) -> IoctlHandler:
    handler = table.get(request)
    if handler is None:
        raise Refusal(_UNKNOWN[on], "ioctl.unknown", request=request, on=on)
    return handler


def _check_owner(call: Call, kvm: Kvm) -> None:
    """A VM and its vCPUs belong to the address space that made them, until the VM is dead."""
    if call.file is None or call.file.owner is not call.client:
        raise Refusal(errno.EIO, "ioctl.other_mm", vm=kvm.number)
    kvm.check_alive()
