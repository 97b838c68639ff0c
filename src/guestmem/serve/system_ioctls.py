"""ioctls of /dev/kvm: what there is, and KVM_CREATE_VM.

Source: virt/kvm/kvm_main.c kvm_dev_ioctl; arch/x86/kvm/x86.c kvm_arch_dev_ioctl; spec/uapi.md section 5.
"""

from __future__ import annotations

import errno
import itertools
import struct

from guestmem.arch.snp import C_BIT
from guestmem.cpu import cpuid
from guestmem.cpu.engine import CpuidTable
from guestmem.cpu.msrs import SAVED
from guestmem.kvm.protected.snp_op import SUPPORTED_POLICY_BITS, SUPPORTED_VMSA_FEATURES
from guestmem.kvm.vm import Kvm
from guestmem.serve import capabilities, kvm_run
from guestmem.serve.call import Call
from guestmem.serve.cpuid_list import write_cpuid
from guestmem.serve.files import VmFile
from guestmem.serve.mce_ioctls import get_mce_cap_supported
from guestmem.serve.msr_list import read_msrs, write_msrs
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi import sev
from guestmem.uapi.kvm import VmType

API_VERSION = 12


async def _get_api_version(call: Call, argument: int) -> int:
    if argument:
        raise Refusal(errno.EINVAL, "ioctl.argument", argument=argument)
    return API_VERSION


async def _create_vm(call: Call, vm_type: int) -> int:
    """Raises: Refusal EINVAL `create_vm.type`; EBUSY `identity.exhausted`."""
    host = call.server.host
    if vm_type not in host.level.vm_types:
        raise Refusal(errno.EINVAL, "create_vm.type", type=vm_type)
    call.server.vms_created += 1
    kvm = Kvm(host.environment, call.server.vms_created, VmType(vm_type), host.level, call.client.memory)
    return call.give(call.server.add_token(VmFile(call.client, kvm)))


async def _check_extension(call: Call, number: int) -> int:
    answer = capabilities.check_extension(call.server.host.level, None, number)
    call.server.report.capability(number, answer)
    return answer


async def _get_vcpu_mmap_size(call: Call, argument: int) -> int:
    if argument:
        raise Refusal(errno.EINVAL, "ioctl.argument", argument=argument)
    return kvm_run.SIZE


async def _get_supported_cpuid(call: Call, argument: int) -> int:
    """With the leaf of SEV where there are SNP VMs, whatever VM it is for. Source: sev_set_cpu_caps."""
    has_snp = VmType.SNP in call.server.host.level.vm_types
    await write_cpuid(call, argument, cpuid.default(C_BIT if has_snp else None))
    return 0


async def _get_emulated_cpuid(call: Call, argument: int) -> int:
    """What a guest may execute though hardware has it not: MOVBE. Source: __do_cpuid_func_emulated."""
    await write_cpuid(call, argument, _EMULATED_CPUID)
    return 0


async def _get_msr_index_list(call: Call, argument: int) -> int:
    await _write_list(call, argument, SAVED)
    return 0


async def _get_msr_feature_index_list(call: Call, argument: int) -> int:
    await _write_list(call, argument, tuple(_FEATURE_MSRS))
    return 0


async def _get_feature_msrs(call: Call, argument: int) -> int:
    """KVM_GET_MSRS of /dev/kvm: how many were read, the first that is no feature ends it."""
    asked = (index for index, _ in await read_msrs(call, argument))
    found = itertools.takewhile(_FEATURE_MSRS.__contains__, asked)
    return await write_msrs(call, argument, ((index, _FEATURE_MSRS[index]) for index in found))


async def _get_device_attr(call: Call, argument: int) -> int:
    """struct kvm_device_attr: flags, group, attribute, and where the answer goes. Raises: Refusal ENXIO
    `device_attr.unknown`."""
    memory = call.client.memory
    _, group, attribute, address = _DEVICE_ATTR.unpack(await memory.copy_from_user(argument, _DEVICE_ATTR.size))
    await memory.copy_to_user(address, struct.pack("<Q", _device_attr(call, group, attribute)))
    return 0


async def _has_device_attr(call: Call, argument: int) -> int:
    data = await call.client.memory.copy_from_user(argument, _DEVICE_ATTR.size)
    _, group, attribute, _ = _DEVICE_ATTR.unpack(data)
    _device_attr(call, group, attribute)
    return 0


def _device_attr(call: Call, group: int, attribute: int) -> int:
    """Source: __kvm_x86_dev_get_attr, sev_dev_get_attr."""
    has_sev = VmType.SNP in call.server.host.level.vm_types
    value = _DEVICE_ATTRS.get((group, attribute)) if has_sev or group != sev.KVM_X86_GRP_SEV else None
    if value is None:
        raise Refusal(errno.ENXIO, "device_attr.unknown", group=group, attribute=attribute)
    return value


_FEATURE_MSRS = {
    0x8B: 0x0100_0065,  # UCODE_REV, as svm_init has it
    0x10A: 0,  # ARCH_CAPABILITIES: a CPU in software has no such faults, and says so by other means
    0x345: 0,  # PERF_CAPABILITIES
    0xCE: 0,  # PLATFORM_INFO: no CPUID faulting
}
_EMULATED_CPUID: CpuidTable = {(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 1 << 22, 0), (7, 0): (0, 0, 0, 0)}
_DEVICE_ATTR = struct.Struct("<IIQQ")
_DEVICE_ATTRS = {
    (0, 0): 0b11,  # KVM_X86_XCOMP_GUEST_SUPP: x87 and SSE
    (sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_VMSA_FEATURES): SUPPORTED_VMSA_FEATURES,
    (sev.KVM_X86_GRP_SEV, sev.KVM_X86_SNP_POLICY_BITS): SUPPORTED_POLICY_BITS,
    (sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_SNP_REQ_CERTS): 1,
}


async def _write_list(call: Call, argument: int, numbers: tuple[int, ...]) -> None:
    """struct kvm_msr_list. Raises: Refusal E2BIG `list.too_small`, with the count that is needed written."""
    memory = call.client.memory
    (room,) = struct.unpack("<I", await memory.copy_from_user(argument, 4))
    await memory.copy_to_user(argument, struct.pack("<I", len(numbers)))
    if room < len(numbers):
        raise Refusal(errno.E2BIG, "list.too_small", room=room, needed=len(numbers))
    await memory.copy_to_user(argument + 4, struct.pack(f"<{len(numbers)}I", *numbers))


TABLE = {
    uapi.KVM_GET_API_VERSION: _get_api_version,
    uapi.KVM_CREATE_VM: _create_vm,
    uapi.KVM_CHECK_EXTENSION: _check_extension,
    uapi.KVM_GET_VCPU_MMAP_SIZE: _get_vcpu_mmap_size,
    uapi.KVM_GET_SUPPORTED_CPUID: _get_supported_cpuid,
    uapi.KVM_GET_EMULATED_CPUID: _get_emulated_cpuid,
    uapi.KVM_X86_GET_MCE_CAP_SUPPORTED: get_mce_cap_supported,
    uapi.KVM_GET_MSR_INDEX_LIST: _get_msr_index_list,
    uapi.KVM_GET_MSR_FEATURE_INDEX_LIST: _get_msr_feature_index_list,
    uapi.KVM_GET_MSRS: _get_feature_msrs,
    uapi.KVM_GET_DEVICE_ATTR: _get_device_attr,
    uapi.KVM_HAS_DEVICE_ATTR: _has_device_attr,
}
