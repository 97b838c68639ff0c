"""Sizes, offsets and numbers of spec/uapi.md sections 2 and 3, against the C headers' own where there are any."""

from __future__ import annotations

import pathlib
import shutil
import struct
import subprocess

import pytest

from guestmem.uapi import kvm as uapi
from guestmem.uapi.structs import (
    Argument,
    CreateGuestMemfd,
    MemoryAttributes,
    MemoryAttributes2,
    PreFaultMemory,
    UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
)

ALL: list[type[Argument]] = [
    CreateGuestMemfd,
    MemoryAttributes,
    MemoryAttributes2,
    PreFaultMemory,
    UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_packing_and_unpacking_are_inverse_and_of_the_stated_size(kind: type[Argument]) -> None:
    data = bytes(range(kind.SIZE))
    assert kind.unpack(data).pack() == data
    with pytest.raises(struct.error):
        kind.unpack(data[:-1])


def test_the_v1_region_is_the_head_of_the_v2_region() -> None:
    v1 = UserspaceMemoryRegion(1, 2, 3 << 12, 4 << 12, 5 << 12)
    assert v1.to_region2().pack()[:32] == v1.pack()
    assert not any(v1.to_region2().pack()[32:])


def test_error_offset_is_where_the_posting_has_it() -> None:
    data = MemoryAttributes2(1, 2, 3, 4, error_offset=0x55).pack()
    assert struct.unpack_from("<Q", data, MemoryAttributes2.ERROR_OFFSET_AT) == (0x55,)


def test_the_fd_of_a_region_is_signed_and_at_its_offset() -> None:
    data = UserspaceMemoryRegion2(0, 4, 0, 4096, guest_memfd_offset=0x1122, guest_memfd=-1).pack()
    assert struct.unpack_from("<QI", data, 32) == (0x1122, 0xFFFFFFFF)


def test_ioctl_numbers() -> None:
    """The values that spec/uapi.md section 2 computed from the macros."""
    assert uapi.KVM_SET_USER_MEMORY_REGION == 0x4020AE46
    assert uapi.KVM_SET_USER_MEMORY_REGION2 == 0x40A0AE49
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES2 == 0xC080AED2
    assert uapi.KVM_CREATE_GUEST_MEMFD == 0xC040AED4
    assert uapi.KVM_PRE_FAULT_MEMORY == 0xC040AED5


def test_numbers_agree_with_this_machines_headers(tmp_path: pathlib.Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    names = [
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_SET_MEMORY_ATTRIBUTES",
        "KVM_CREATE_GUEST_MEMFD",
        "KVM_MEM_GUEST_MEMFD",
        "KVM_MEM_READONLY",
        "KVM_MEM_LOG_DIRTY_PAGES",
        "KVM_MEMORY_ATTRIBUTE_PRIVATE",
    ]
    prints = "\n".join(
        f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long){name});\n#endif' for name in names
    )
    source = tmp_path / "numbers.c"
    source.write_text(f"#include <stdio.h>\n#include <linux/kvm.h>\nint main(void){{\n{prints}\nreturn 0;}}\n")
    program = tmp_path / "numbers"
    if subprocess.run(["gcc", "-o", str(program), str(source)], capture_output=True, check=False).returncode:
        pytest.skip("no linux/kvm.h")
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines, "the headers define none of the names"
    for line in lines:
        name, value = line.split()
        assert getattr(uapi, name) == int(value) & 0xFFFFFFFF, name
