"""CPUID of a TD, as a VMM asks what it may choose, chooses, and reads what came of it.

KVM has one word of its own in it: the width of guest physical addresses, in EAX 23:16 of leaf 0x80000008, which must be
there. Bits that the module refuses come back as its error; leaves that it does not know KVM refuses itself.

Source: arch/x86/kvm/vmx/tdx.c td_init_cpuid_entry2, setup_tdparams_eptp_controls, setup_tdparams_cpuids,
tdx_vcpu_get_cpuid.
"""

from __future__ import annotations

import errno

from guestmem.arch.tdx.parameters import CpuidValues, Registers, TdParams, cpuid_configurable, cpuid_of
from guestmem.kvm.vm import HostAddressSpace
from guestmem.trace import Refusal
from guestmem.uapi import tdx

GPA_BITS = 48
"""S-EPTs here have four levels: no TD has 52."""

_ADDRESS_SIZES = 0x8000_0008
_GPA_BITS_SHIFT = 16
_GPA_BITS_MASK = 0xFF << _GPA_BITS_SHIFT
_HLE, _RTM, _WAITPKG = 1 << 4, 1 << 11, 1 << 5
_BASIC, _EXTENDED = 0, 0x8000_0000


async def read_choice(mm: HostAddressSpace, address: int) -> CpuidValues:
    """The configurable bits in a struct kvm_cpuid2.

    Raises: Refusal EFAULT; E2BIG `list.too_long`; EINVAL `tdx_op.cpuid`.
    """
    count, padding = tdx.CPUID2.unpack(await mm.copy_from_user(address, tdx.CPUID2.size))
    if count > tdx.KVM_MAX_CPUID_ENTRIES:
        raise Refusal(errno.E2BIG, "list.too_long", count=count, limit=tdx.KVM_MAX_CPUID_ENTRIES)
    data = await mm.copy_from_user(address + tdx.CPUID2.size, count * tdx.CPUID_ENTRY2.size) if count else b""
    if padding:
        raise Refusal(errno.EINVAL, "tdx_op.cpuid", padding=padding)
    entries = {(leaf, index): tuple(rest) for leaf, index, _, *rest in tdx.CPUID_ENTRY2.iter_unpack(data)}
    _check_gpa_bits(entries)
    chosen: dict[tuple[int, int], Registers] = {}
    for key in cpuid_configurable():
        if key in entries:
            eax, ebx, ecx, edx = entries[key]
            if key == (7, 0) and (ebx & (_HLE | _RTM) or ecx & _WAITPKG):
                raise Refusal(errno.EINVAL, "tdx_op.cpuid", leaf=7, ebx=ebx, ecx=ecx)
            chosen[key] = (eax & ~_GPA_BITS_MASK if key[0] == _ADDRESS_SIZES else eax), ebx, ecx, edx
    if len(chosen) != count:
        raise Refusal(errno.EINVAL, "tdx_op.cpuid", entries=count, configurable=len(chosen))
    return chosen


def _check_gpa_bits(entries: dict[tuple[int, int], tuple[int, ...]]) -> None:
    eax = entries.get((_ADDRESS_SIZES, 0), (0,))[0]
    bits = (eax & _GPA_BITS_MASK) >> _GPA_BITS_SHIFT
    if bits != GPA_BITS:
        raise Refusal(errno.EINVAL, "tdx_op.cpuid", leaf=_ADDRESS_SIZES, gpa_bits=bits)


def configurable() -> list[bytes]:
    """The bits that a VMM may choose, an entry for each leaf."""
    return [_pack(key, values, gpa_bits=0xFF) for key, values in cpuid_configurable().items()]


def of_td(params: TdParams) -> list[bytes]:
    """What CPUID answers in the TD, in the order of the leaves: the basic ones and the extended."""
    answers = cpuid_of(params)
    last = {answers[first, 0][0] for first in (_BASIC, _EXTENDED)}
    return [
        _pack(key, values, gpa_bits=GPA_BITS)
        for key, values in sorted(answers.items())
        if any(start <= key[0] <= end for start, end in zip((_BASIC, _EXTENDED), sorted(last), strict=True))
    ]


async def write(mm: HostAddressSpace, address: int, entries: list[bytes]) -> None:
    """A struct kvm_cpuid2, if there is room for `nent` entries; how many there are is written in any case.

    Raises: Refusal EFAULT; E2BIG `list.too_small`.
    """
    room, padding = tdx.CPUID2.unpack(await mm.copy_from_user(address, tdx.CPUID2.size))
    await mm.copy_to_user(address, tdx.CPUID2.pack(len(entries), padding))
    check_room(room, entries)
    await mm.copy_to_user(address + tdx.CPUID2.size, b"".join(entries))


def check_room(room: int, entries: list[bytes]) -> None:
    """Raises: Refusal E2BIG `list.too_small`."""
    if room < len(entries):
        raise Refusal(errno.E2BIG, "list.too_small", room=room, needed=len(entries))


def _pack(key: tuple[int, int], values: Registers, gpa_bits: int) -> bytes:
    leaf, index = key
    eax, *rest = values
    if leaf == _ADDRESS_SIZES:
        eax = eax & ~_GPA_BITS_MASK | gpa_bits << _GPA_BITS_SHIFT
    flags = tdx.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf == 7 else 0
    return tdx.CPUID_ENTRY2.pack(leaf, index, flags, eax, *rest)
