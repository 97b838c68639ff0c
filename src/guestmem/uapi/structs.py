"""Argument structures of the ioctls: what a client passes, still an allegation.

Little-endian words of fixed width without padding, sizes and offsets as in spec/uapi.md section 3. `reserved` words are
kept as they came, since some calls must look at them and others must not.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Hashable
from typing import ClassVar, TypeVar

S = TypeVar("S", bound="Argument")


class Argument:
    """Base: `SIZE` bytes, read by `unpack`, written by `pack`. `_LAYOUT` names the words before `reserved`."""

    _LAYOUT: ClassVar[struct.Struct]
    SIZE: ClassVar[int]

    @classmethod
    def unpack(cls: type[S], data: bytes) -> S:
        """Raises: struct.error unless `data` has SIZE bytes."""
        words = cls._LAYOUT.unpack(data)
        named = _named_words(cls)  # type: ignore[arg-type]
        if named < len(words):
            words = (*words[:named], words[named:])
        return cls(*words)

    def pack(self) -> bytes:
        *words, last = dataclasses.astuple(self)  # type: ignore[call-overload]
        return self._LAYOUT.pack(*words, *(last if isinstance(last, tuple) else (last,)))


@functools.cache
def _named_words(argument: Hashable) -> int:
    """How many words stand before `reserved`, which takes the rest."""
    names = [field.name for field in dataclasses.fields(argument)]  # type: ignore[arg-type]
    return len(names) - (names[-1] == "reserved")


@dataclasses.dataclass(frozen=True, slots=True)
class CreateGuestMemfd(Argument):
    """struct kvm_create_guest_memfd."""

    _LAYOUT = struct.Struct("<QQ6Q")
    SIZE = 64

    size: int
    flags: int = 0
    reserved: tuple[int, ...] = (0,) * 6


@dataclasses.dataclass(frozen=True, slots=True)
class UserspaceMemoryRegion(Argument):
    """struct kvm_userspace_memory_region."""

    _LAYOUT = struct.Struct("<IIQQQ")
    SIZE = 32

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

    def to_region2(self) -> UserspaceMemoryRegion2:
        return UserspaceMemoryRegion2(
            self.slot, self.flags, self.guest_phys_addr, self.memory_size, self.userspace_addr
        )


@dataclasses.dataclass(frozen=True, slots=True)
class UserspaceMemoryRegion2(Argument):
    """struct kvm_userspace_memory_region2. `slot` holds the address space in its upper 16 bits; `guest_memfd` is read
    as a signed number, as the kernel hands it to fget()."""

    _LAYOUT = struct.Struct("<IIQQQQiI14Q")
    SIZE = 160

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int = 0
    guest_memfd_offset: int = 0
    guest_memfd: int = 0
    reserved: tuple[int, ...] = (0,) * 15

    @property
    def userfault_bitmap(self) -> int:
        """The first word of pad2, where KVM Userfault (v3) has an address of the caller's."""
        return self.reserved[1]

    def with_userfault(self, flag: int, bitmap: int) -> UserspaceMemoryRegion2:
        """The same with KVM_MEM_USERFAULT, which is `flag` where it is posted, and a bitmap at that address."""
        reserved = (self.reserved[0], bitmap, *self.reserved[2:])
        return dataclasses.replace(self, flags=self.flags | flag, reserved=reserved)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryAttributes(Argument):
    """struct kvm_memory_attributes."""

    _LAYOUT = struct.Struct("<QQQQ")
    SIZE = 32

    address: int
    size: int
    attributes: int
    flags: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryAttributes2(Argument):
    """struct kvm_memory_attributes2, proposed. `offset` is in the file."""

    _LAYOUT = struct.Struct("<QQQQQ11Q")
    SIZE = 128
    ERROR_OFFSET_AT: ClassVar[int] = 32

    offset: int
    size: int
    attributes: int
    flags: int = 0
    error_offset: int = 0
    reserved: tuple[int, ...] = (0,) * 11


@dataclasses.dataclass(frozen=True, slots=True)
class GmemConvert(Argument):
    """struct kvm_gmem_convert, proposed with the 1G series. `offset` is in the file."""

    _LAYOUT = struct.Struct("<QQQ5Q")
    SIZE = 64
    ERROR_OFFSET_AT: ClassVar[int] = 16

    offset: int
    size: int
    error_offset: int = 0
    reserved: tuple[int, ...] = (0,) * 5


@dataclasses.dataclass(frozen=True, slots=True)
class LinkGuestMemfd(Argument):
    """struct kvm_link_guest_memfd, proposed. The descriptor is a u64 of which the kernel looks at the low half."""

    _LAYOUT = struct.Struct("<QQ6Q")
    SIZE = 64

    fd: int
    flags: int = 0
    reserved: tuple[int, ...] = (0,) * 6


@dataclasses.dataclass(frozen=True, slots=True)
class PreFaultMemory(Argument):
    """struct kvm_pre_fault_memory. `gpa` and `size` come back advanced."""

    _LAYOUT = struct.Struct("<QQQ5Q")
    SIZE = 64

    gpa: int
    size: int
    flags: int = 0
    reserved: tuple[int, ...] = (0,) * 5
