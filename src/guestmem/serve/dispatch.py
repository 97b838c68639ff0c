"""ioctls: from a request number to the function that does it, one table for each kind of file.

Every handler takes the call and the ioctl's argument (a number or a user address) and returns the ioctl's value. What
is not in a table is ENOTTY on a VM or a guest_memfd and EINVAL on a vCPU and /dev/kvm, as in the kernel, and is listed
in the report.

Source: virt/kvm/kvm_main.c kvm_dev_ioctl, kvm_vm_ioctl, kvm_vcpu_ioctl; golden_6_18.md rows K1 to K13, G44.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from guestmem.iommu import ioctl as iommu_ioctl
from guestmem.kvm.ioctl import UNKNOWN, built_request, gmem_ioctl
from guestmem.kvm.vm import Kvm
from guestmem.serve import kvm_devices, system_ioctls, vcpu_ioctls, vm_ioctls
from guestmem.serve.call import Call
from guestmem.serve.files import GmemFile, IommuFile, KvmDevice, KvmVfioFile, VcpuFile, VfioFile, VmFile
from guestmem.serve.gup_test import GupTest
from guestmem.serve.iommu_caller import IommuCaller
from guestmem.serve.liveupdate import LiveUpdateFile, SessionFile
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi

IoctlHandler: TypeAlias = Callable[[Call, int], Awaitable[int]]
Table: TypeAlias = Mapping[int, IoctlHandler]

_IOC_READ = 2
_UNKNOWN = {"/dev/kvm": errno.EINVAL, **UNKNOWN}


async def ioctl(call: Call) -> int:
    """The wire's IOCTL. Raises: Refusal `ioctl.unknown`, `ioctl.wrong_file`, `ioctl.other_mm`; what the handler
    refuses."""
    try:
        return await _ioctl(call)
    except Refusal as refusal:
        homes = _HOMES.get(call.request.a & 0xFFFF_FFFF)
        if refusal.rule != "ioctl.unknown" or homes is None or refusal.facts.get("on") in homes:
            raise
        raise _wrong_file(refusal, homes) from None


def _wrong_file(refusal: Refusal, homes: Sequence[str]) -> Refusal:
    """The program's mistake, then, and nothing that is lacking."""
    on, of = refusal.facts.get("on"), " or ".join(homes)
    return Refusal(refusal.errno or errno.EINVAL, "ioctl.wrong_file", on=on, of=of)


async def _ioctl(call: Call) -> int:
    request, argument = call.request.a & 0xFFFF_FFFF, call.request.b
    call.begin_ioctl(request >> 16 & 0x3FFF, request >> 30)
    file = call.file
    match file:
        case KvmDevice():
            return await _look_up(system_ioctls.TABLE, request, "/dev/kvm")(call, argument)
        case VmFile():
            _check_owner(call, file.kvm)
            request = built_request(file.kvm, request, "VM")
            return await _look_up(vm_ioctls.TABLE, request, "VM")(call, argument)
        case VcpuFile():
            _check_owner(call, file.vcpu.kvm)
            request = built_request(file.vcpu.kvm, request, "vCPU")
            return await _look_up(vcpu_ioctls.TABLE, request, "vCPU")(call, argument)
        case KvmVfioFile():
            return await kvm_devices.ioctl(call, file, request, argument)
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


_OF_A_GMEM = (uapi.KVM_SET_MEMORY_ATTRIBUTES2, uapi.KVM_GMEM_CONVERT_SHARED, uapi.KVM_GMEM_CONVERT_PRIVATE)
_HOMES: dict[int, list[str]] = {}
"""Which kinds of file an ioctl belongs to."""
for _on, _table in (
    ("/dev/kvm", system_ioctls.TABLE),
    ("VM", vm_ioctls.TABLE),
    ("vCPU", vcpu_ioctls.TABLE),
    ("guest_memfd", _OF_A_GMEM),
):
    for _request in _table:
        _HOMES.setdefault(_request, []).append(_on)


def _check_owner(call: Call, kvm: Kvm) -> None:
    """A VM and its vCPUs belong to the address space that made them, until the VM is dead."""
    if call.file is None or call.file.owner is not call.client:
        raise Refusal(errno.EIO, "ioctl.other_mm", vm=kvm.number)
    kvm.check_alive()
