"""KVM_MEMORY_ENCRYPT_OP on an SNP VM: a launch as a client asks for it.

Memory is filled in place (a source address of zero: the bytes that were written while the pages were shared) or from
the client's. What firmware said comes back in the command's `error`.

Source: arch/x86/kvm/svm/sev.c sev_mem_enc_ioctl, snp_launch_start, snp_launch_update, snp_launch_finish;
Documentation/virt/kvm/x86/amd-memory-encryption.rst; in-place v8 for the source address of zero.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable

from guestmem.arch.snp.digest import PageType
from guestmem.arch.snp.firmware import POLICY_RESERVED_1, SevStatus
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vm import HostAddressSpace, Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_SEV_INIT2
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_FINISH as LAUNCH_FINISH
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_START as LAUNCH_START
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_UPDATE as LAUNCH_UPDATE

_COMMAND = struct.Struct("<IIQII")  # struct kvm_sev_cmd: id, pad, data, error, sev_fd
_ERROR_OFFSET = 16
_INIT = struct.Struct("<QIHH8I")  # struct kvm_sev_init
_START = struct.Struct("<Q16sH6x4Q")  # struct kvm_sev_snp_launch_start
_UPDATE = struct.Struct("<QQQBBHI4Q")  # struct kvm_sev_snp_launch_update
_FINISH = struct.Struct("<QQBBB32s3sH4x4Q")  # struct kvm_sev_snp_launch_finish

_Command = Callable[[Kvm, HostAddressSpace, int], Awaitable[None]]


async def snp_op(kvm: Kvm, mm: HostAddressSpace, argument: int) -> int:
    """Do the command at a user address.

    Raises: Refusal EINVAL `snp_op.command`, `snp_op.order`, `snp_op.argument`; EFAULT; as `launch`.
    """
    number, _, data, _, _ = _COMMAND.unpack(await mm.copy_from_user(argument, _COMMAND.size))
    command = _COMMANDS.get(number)
    if command is None:
        raise Refusal(errno.EINVAL, "snp_op.command", command=number)
    if (number == KVM_SEV_INIT2) is kvm.encryption_initialised:
        raise Refusal(errno.EINVAL, "snp_op.order", command=number, initialised=kvm.encryption_initialised)
    try:
        await command(kvm, mm, data)
    except Refusal as refusal:
        code = SevStatus.__members__.get(str(refusal.facts.get("code")), SevStatus.SUCCESS)
        await mm.copy_to_user(argument + _ERROR_OFFSET, struct.pack("<I", code))
        raise
    return 0


async def _init2(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """No VMSA features are offered. Source: sev_guest_init2."""
    if any(_INIT.unpack(await mm.copy_from_user(data, _INIT.size))):
        raise Refusal(errno.EINVAL, "snp_op.argument", command=KVM_SEV_INIT2)
    kvm.encryption_initialised = True


async def _launch_start(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    policy, _, flags, *_ = _START.unpack(await mm.copy_from_user(data, _START.size))
    if flags or not policy & POLICY_RESERVED_1:
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_START, policy=policy, flags=flags)
    await launch_start(kvm, policy)


async def _launch_update(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """What was done is taken off the client's range, so that it may call again for the rest."""
    gfn, address, length, kind, pad, flags, *rest = _UPDATE.unpack(await mm.copy_from_user(data, _UPDATE.size))
    known = kind in (PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID)
    if not known or pad or flags or not length or (address | length) % PAGE_SIZE:
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_UPDATE, type=kind, uaddr=address, len=length)
    source = address if address and kind != PageType.ZERO else None
    done = await launch_update(kvm, Gfn(gfn), source, length >> PAGE_SHIFT, kind)
    address += done << PAGE_SHIFT if source is not None else 0
    left = length - (done << PAGE_SHIFT)
    await mm.copy_to_user(data, _UPDATE.pack(gfn + done, address, left, kind, pad, flags, *rest))


async def _launch_finish(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """Without an ID block: its signature would be checked by firmware that is not here."""
    _, _, id_block, auth_key, _, _, _, flags, *_ = _FINISH.unpack(await mm.copy_from_user(data, _FINISH.size))
    if id_block or auth_key or flags:
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_FINISH, id_block=id_block, flags=flags)
    await launch_finish(kvm)


_COMMANDS: dict[int, _Command] = {
    KVM_SEV_INIT2: _init2,
    LAUNCH_START: _launch_start,
    LAUNCH_UPDATE: _launch_update,
    LAUNCH_FINISH: _launch_finish,
}
