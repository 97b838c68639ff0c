"""KVM_MEMORY_ENCRYPT_OP on an SNP VM: a launch as a client asks for it.

Memory is filled in place (a source address of zero: the bytes that were written while the pages were shared) or from
the client's. What firmware said comes back in the command's `error`.

Source: arch/x86/kvm/svm/sev.c sev_mem_enc_ioctl, __sev_guest_init, snp_launch_start, snp_launch_update,
snp_launch_finish, snp_enable_certs; Documentation/virt/kvm/x86/amd-memory-encryption.rst; in-place v8 for the source
address of zero.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable

from guestmem.arch.snp import SnpGuest, policy
from guestmem.arch.snp.digest import PageType
from guestmem.arch.snp.id_block import ID_AUTH_BYTES, ID_BLOCK_BYTES, LaunchFinish
from guestmem.arch.snp.status import SevStatus
from guestmem.arch.snp.vmsa import DEBUG_SWAP, SNP_ACTIVE
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.protected.launch import launch_finish, launch_start, launch_update
from guestmem.kvm.vm import HostAddressSpace, Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi import sev
from guestmem.uapi.kvm import KVM_SEV_INIT2
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_FINISH as LAUNCH_FINISH
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_START as LAUNCH_START
from guestmem.uapi.kvm import KVM_SEV_SNP_LAUNCH_UPDATE as LAUNCH_UPDATE

SUPPORTED_VMSA_FEATURES = DEBUG_SWAP
SUPPORTED_POLICY_BITS = policy.FIRMWARE_BITS & ~policy.MIGRATE_MA
"""KVM_SNP_POLICY_MASK_VALID, as far as firmware knows the bits: KVM has no migration agents."""

_ALLOWED_FROM_MIRROR = (
    sev.KVM_SEV_LAUNCH_UPDATE_VMSA,
    sev.KVM_SEV_GUEST_STATUS,
    sev.KVM_SEV_DBG_DECRYPT,
    sev.KVM_SEV_DBG_ENCRYPT,
)
_UPDATED_BY_CLIENT = (PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID)
_OF_POPULATE = ("populate.", "fault.", "user.", "launch.update")

_Command = Callable[[Kvm, HostAddressSpace, int], Awaitable[None]]


async def snp_op(kvm: Kvm, mm: HostAddressSpace, argument: int) -> int:
    """Do the command at a user address; without an address nothing, by which a VMM asks whether there is SEV.

    Raises: Refusal EFAULT; EINVAL `snp_op.mirror`; EPERM `snp_op.not_snp`; EINVAL `snp_op.command`; ENOTTY or EINVAL
    `snp_op.not_init`; EINVAL `snp_op.vcpus`, `snp_op.context`, `snp_op.no_context`, `snp_op.policy`, `snp_op.argument`;
    EIO `snp_op.populate`; as `launch`.
    """
    if not argument:
        return 0
    number, _, data, _, _ = sev.COMMAND.unpack(await mm.copy_from_user(argument, sev.COMMAND.size))
    command = _find(kvm, number)
    try:
        await command(kvm, mm, data)
    except Refusal as refusal:
        code = SevStatus.__members__.get(str(refusal.facts.get("code")), SevStatus.SUCCESS)
        await mm.copy_to_user(argument + sev.ERROR_OFFSET, struct.pack("<I", code))
        raise
    return 0


def _find(kvm: Kvm, number: int) -> _Command:
    """Source: sev_mem_enc_ioctl, and the first checks of what it calls."""
    initialised = kvm.encryption_initialised
    if kvm.mirror_of is not None and number not in _ALLOWED_FROM_MIRROR:
        raise Refusal(errno.EINVAL, "snp_op.mirror", command=number, owner=kvm.mirror_of.number)
    if (initialised or kvm.mirror_of is not None) and number < LAUNCH_START:
        raise Refusal(errno.EPERM, "snp_op.not_snp", command=number)
    command = _COMMANDS.get(number)
    if command is None and number not in sev.COMMANDS_OF_SEV:
        raise Refusal(errno.EINVAL, "snp_op.command", command=number)
    if command is None or not (initialised or number == KVM_SEV_INIT2):
        raise Refusal(_answer_without_init(number), "snp_op.not_init", command=number)
    return command


def _answer_without_init(number: int) -> int:
    return errno.EINVAL if number in _EINVAL_WITHOUT_INIT else errno.ENOTTY


async def _init2(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """Which version of the GHCB protocol and which features the vCPUs will have. Source: __sev_guest_init."""
    features, flags, ghcb_version, *_ = sev.INIT.unpack(await mm.copy_from_user(data, sev.INIT.size))
    _check_no_vcpus(kvm, KVM_SEV_INIT2)
    version = ghcb_version or sev.GHCB_VERSION_OF_SNP
    if flags or features & ~SUPPORTED_VMSA_FEATURES or version != sev.GHCB_VERSION_OF_SNP:
        raise Refusal(
            errno.EINVAL,
            "snp_op.argument",
            command=KVM_SEV_INIT2,
            flags=flags,
            vmsa_features=features,
            supported=SUPPORTED_VMSA_FEATURES,
            ghcb_version=ghcb_version,
        )
    _guest(kvm).vmsa_features = features | SNP_ACTIVE
    kvm.encryption_initialised = True


async def _launch_start(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    bits, _, flags, *_ = sev.SNP_LAUNCH_START.unpack(await mm.copy_from_user(data, sev.SNP_LAUNCH_START.size))
    if _guest(kvm).context is not None:
        raise Refusal(errno.EINVAL, "snp_op.context", command=LAUNCH_START)
    if flags:
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_START, flags=flags)
    if bits & ~SUPPORTED_POLICY_BITS or not bits & policy.RESERVED_1:
        raise Refusal(errno.EINVAL, "snp_op.policy", policy=bits, supported=SUPPORTED_POLICY_BITS)
    await launch_start(kvm, bits)


async def _launch_update(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """What was done is taken off the client's range, so that it may call again for the rest."""
    layout = sev.SNP_LAUNCH_UPDATE
    _check_context(kvm, LAUNCH_UPDATE)
    gfn, address, length, kind, pad, flags, *rest = layout.unpack(await mm.copy_from_user(data, layout.size))
    if kind not in _UPDATED_BY_CLIENT or flags or not length or (address | length) % PAGE_SIZE:
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_UPDATE, type=kind, uaddr=address, len=length)
    source = address if address and kind != PageType.ZERO else None
    done = await _populate(kvm, Gfn(gfn), source, length >> PAGE_SHIFT, kind)
    address += done << PAGE_SHIFT if source is not None else 0
    left = length - (done << PAGE_SHIFT)
    await mm.copy_to_user(data, layout.pack(gfn + done, address, left, kind, pad, flags, *rest))


async def _populate(kvm: Kvm, gfn: Gfn, source: int | None, pages: int, kind: int) -> int:
    """How many pages were done. KVM answers EIO whatever stopped the first, but for a frame in no slot."""
    try:
        return await launch_update(kvm, gfn, source, pages, kind)
    except Refusal as refusal:
        if not refusal.rule.startswith(_OF_POPULATE) or refusal.rule == "populate.not_gmem":
            raise
        raise Refusal(errno.EIO, "snp_op.populate", cause=refusal.rule, **refusal.facts) from refusal


async def _launch_finish(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    layout = sev.SNP_LAUNCH_FINISH
    _check_context(kvm, LAUNCH_FINISH)
    block_at, auth_at, with_block, author_key, vcek_disabled, host_data, flags, *_ = layout.unpack(
        await mm.copy_from_user(data, layout.size)
    )
    if flags or (with_block and not (block_at and auth_at)):
        raise Refusal(errno.EINVAL, "snp_op.argument", command=LAUNCH_FINISH, flags=flags, id_block=block_at)
    finish = LaunchFinish(vcek_disabled=bool(vcek_disabled), host_data=host_data)
    if with_block:
        block = await mm.copy_from_user(block_at, ID_BLOCK_BYTES)
        auth = await mm.copy_from_user(auth_at, ID_AUTH_BYTES)
        finish = finish._replace(id_block=block, id_auth=auth, author_key=bool(author_key))
    await launch_finish(kvm, finish)


async def _enable_certificates(kvm: Kvm, mm: HostAddressSpace, data: int) -> None:
    """An extended guest request would be an exit. No guest here makes one, so there is nothing to remember."""
    _check_no_vcpus(kvm, sev.KVM_SEV_SNP_ENABLE_REQ_CERTS)


def _guest(kvm: Kvm) -> SnpGuest:
    guest = kvm.machine.architecture
    assert isinstance(guest, SnpGuest)
    return guest


def _check_no_vcpus(kvm: Kvm, command: int) -> None:
    if kvm.created_vcpus:
        raise Refusal(errno.EINVAL, "snp_op.vcpus", command=command, vcpus=kvm.created_vcpus)


def _check_context(kvm: Kvm, command: int) -> None:
    if _guest(kvm).context is None:
        raise Refusal(errno.EINVAL, "snp_op.no_context", command=command)


_COMMANDS: dict[int, _Command] = {
    KVM_SEV_INIT2: _init2,
    LAUNCH_START: _launch_start,
    LAUNCH_UPDATE: _launch_update,
    LAUNCH_FINISH: _launch_finish,
    sev.KVM_SEV_SNP_ENABLE_REQ_CERTS: _enable_certificates,
}
_EINVAL_WITHOUT_INIT = (sev.KVM_SEV_INIT, sev.KVM_SEV_ES_INIT, LAUNCH_UPDATE, sev.KVM_SEV_SNP_ENABLE_REQ_CERTS)
