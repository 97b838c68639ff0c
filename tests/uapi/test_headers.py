"""The probe: every capability 0 to 300 and every flag bit of every level, against the headers of that kernel.

`python -m tests.uapi.kvm_headers` brings the headers of those kernels that Debian has; the others are skipped unless
somebody has put them beside those.
"""

from __future__ import annotations

import re

import pytest

from guestmem.host import Host
from guestmem.kvm.gmem import supported_flags
from guestmem.serve.capabilities import check_extension
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from tests.uapi.kvm_headers import definitions

_POSTED = {"future": {"HUGETLB", "USERFAULT"}}
"""Flags and capabilities of a level that are in no header: what is only posted."""

_MASKS = re.compile(r"^\(1U?L{0,2} << (\d+)\)$")
_NOT_A_CAPABILITY = 300


def headers(level: str) -> dict[str, str]:
    try:
        return definitions(level)
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not here (python -m tests.uapi.kvm_headers)")


@pytest.mark.parametrize("level", LEVELS)
def test_a_number_is_the_capability_that_the_header_says(level: str) -> None:
    theirs = {}
    for name, text in headers(level).items():
        if name.startswith("KVM_CAP_") and text.isdigit():
            theirs[int(text)] = name.removeprefix("KVM_CAP_")
    ours = {number: LEVELS[level].capability(number) for number in range(_NOT_A_CAPABILITY + 1)}
    posted = _POSTED.get(level, ())
    assert {number: name for number, name in ours.items() if name and name not in posted} == theirs


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vm_type", [None, VmType.DEFAULT, VmType.SW_PROTECTED])
def test_what_the_header_does_not_have_is_answered_with_nothing(level: str, vm_type: VmType | None) -> None:
    """On /dev/kvm and on a VM of each type, under number and level alike."""
    theirs = {int(text) for name, text in headers(level).items() if name.startswith("KVM_CAP_") and text.isdigit()}
    with Host(level=LEVELS[level]) as host:
        kvm = host.create_vm(vm_type).kvm if vm_type is not None else None
        answered = {number for number in range(_NOT_A_CAPABILITY + 1) if check_extension(LEVELS[level], kvm, number)}
    posted = {LEVELS[level].capabilities.get(name, 0) for name in _POSTED.get(level, ())}
    assert answered <= theirs | posted
    assert {3, 231, 235} <= answered, "USER_MEMORY, USER_MEMORY2, VM_TYPES"


@pytest.mark.parametrize("level", LEVELS)
def test_a_create_flag_is_the_bit_that_the_header_says(level: str) -> None:
    theirs = _bits(headers(level), "GUEST_MEMFD_FLAG_")
    ours = {name: mask for name, mask in LEVELS[level].create_flags.items() if name not in _POSTED.get(level, ())}
    assert ours == theirs
    with Host(level=LEVELS[level]) as host:
        legal = supported_flags(host.create_vm(VmType.DEFAULT).kvm)
    assert legal == sum(LEVELS[level].create_flags.values())


@pytest.mark.parametrize("level", LEVELS)
def test_bits_that_no_level_moves_are_those_of_every_header(level: str) -> None:
    theirs = headers(level)
    assert _bits(theirs, "KVM_MEM_") == {
        "LOG_DIRTY_PAGES": uapi.KVM_MEM_LOG_DIRTY_PAGES,
        "READONLY": uapi.KVM_MEM_READONLY,
        "GUEST_MEMFD": uapi.KVM_MEM_GUEST_MEMFD,
    }
    assert _bits(theirs, "KVM_MEMORY_ATTRIBUTE_") == {"PRIVATE": uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE}


@pytest.mark.parametrize("level", LEVELS)
def test_a_vm_type_is_one_that_the_header_has(level: str) -> None:
    """The header may have more: SEV and SEV-ES are not built here, SNP and TDX at in-place levels only."""
    pattern = re.compile(r"^KVM_X86_(\w+)_VM$")
    theirs = {found[1]: int(text) for name, text in headers(level).items() if (found := pattern.match(name))}
    ours = {vm_type.name: int(vm_type) for vm_type in LEVELS[level].vm_types}
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize("level", LEVELS)
def test_an_ioctl_that_only_some_levels_have_is_in_their_headers(level: str) -> None:
    theirs = headers(level)
    posted = {"LINK_GUEST_MEMFD", "GMEM_CONVERT_SHARED", "GMEM_CONVERT_PRIVATE"} if level == "future" else set()
    for name, request in LEVELS[level].ioctls.items():
        if name in posted:
            assert f"KVM_{name}" not in theirs
            continue
        macro, number = re.split(r"\(KVMIO,\s*|,", theirs[f"KVM_{name}"])[:2]
        direction = {"_IO": 0, "_IOW": 1, "_IOR": 2, "_IOWR": 3}[macro.strip()]
        assert (request >> 30, request >> 8 & 0xFF, request & 0xFF) == (direction, uapi.KVMIO, int(number, 0)), name


def _bits(macros: dict[str, str], prefix: str) -> dict[str, int]:
    found = {}
    for name, text in macros.items():
        if name.startswith(prefix) and (mask := _MASKS.match(text)):
            found[name.removeprefix(prefix)] = 1 << int(mask[1])
    return found
