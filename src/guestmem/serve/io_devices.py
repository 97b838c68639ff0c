"""ioeventfd and coalesced MMIO: guest writes that are no exits.

Source: virt/kvm/eventfd.c kvm_ioeventfd, virt/kvm/coalesced_mmio.c.
"""

from __future__ import annotations

import errno
import os
import struct

from guestmem.serve import kvm_run
from guestmem.serve.call import Call
from guestmem.serve.files import VmFile
from guestmem.serve.irqfd import eventfd_id, signal
from guestmem.trace import Refusal

_IOEVENTFD = struct.Struct("<QQIiI36x")  # datamatch, addr, len, fd, flags
_DATAMATCH, _PIO, _DEASSIGN, _VIRTIO_CCW = 1, 2, 4, 8
_ZONE = struct.Struct("<QII")  # addr, size, pio
_LENGTHS = (0, 1, 2, 4, 8)


class IoEventFd:
    """A write of `size` bytes (0: any number) to `address` adds one to an eventfd, which this holds. `identity` is the
    kernel's number of it."""

    def __init__(self, fd: int, address: int, size: int, is_port: bool, datamatch: int | None) -> None:
        self.fd = fd
        self.identity = eventfd_id(fd)
        self.key = (address, size, is_port, datamatch)

    def collides(self, other: IoEventFd) -> bool:
        """Whether one write could be meant for both. Source: ioeventfd_check_collision."""
        (at, size, is_port, match), (other_at, other_size, other_port, other_match) = self.key, other.key
        if (at, is_port) != (other_at, other_port):
            return False
        return (
            not size
            or not other_size
            or (size == other_size and (None in (match, other_match) or match == other_match))
        )

    def write(self, address: int, size: int, value: int, is_port: bool) -> bool:
        at, length, port, datamatch = self.key
        if (address, is_port) != (at, port) or (length and size != length):
            return False
        if datamatch is not None and value != datamatch:
            return False
        signal(self.fd)
        return True

    def close(self) -> None:
        os.close(self.fd)


class CoalescedZone:
    """Writes inside the zone are put into the ring that all vCPUs of the VM show, until it is full."""

    def __init__(self, ring: kvm_run.CoalescedRing, start: int, size: int, is_port: bool) -> None:
        self.ring = ring
        self.key = (start, size, is_port)

    def write(self, address: int, size: int, value: int, is_port: bool) -> bool:
        start, length, port = self.key
        inside = start <= address and address + size <= start + length
        return inside and port == is_port and self.ring.put(address, size, value, is_port)

    def close(self) -> None:
        """The ring is the VM's."""


async def ioeventfd(call: Call, argument: int) -> int:
    """KVM_IOEVENTFD.

    Raises: Refusal EINVAL `ioeventfd.argument`; EBADF `fd.not_open`; EINVAL `irqfd.no_eventfd`; EEXIST
    `ioeventfd.exists`; ENOENT `ioeventfd.none`.
    """
    data = await call.client.memory.copy_from_user(argument, _IOEVENTFD.size)
    datamatch, address, size, number, flags = _IOEVENTFD.unpack(data)
    known = _DATAMATCH | _PIO | _DEASSIGN
    if size not in _LENGTHS or address + size >= 1 << 64 or flags & ~known or (not size and flags & _DATAMATCH):
        raise Refusal(errno.EINVAL, "ioeventfd.argument", address=address, size=size, flags=flags)
    kvm = call.kvm
    fd = await call.take_descriptor(number)
    new = IoEventFd(fd, address, size, bool(flags & _PIO), datamatch if flags & _DATAMATCH else None)
    if new.identity is None:
        new.close()
        raise Refusal(errno.EINVAL, "irqfd.no_eventfd", fd=number)
    present = [device for device in kvm.io_devices if isinstance(device, IoEventFd)]
    old = next((d for d in present if (d.key, d.identity) == (new.key, new.identity)), None)
    if not flags & _DEASSIGN:
        if any(device.collides(new) for device in present):
            new.close()
            raise Refusal(errno.EEXIST, "ioeventfd.exists", address=address, size=size)
        kvm.io_devices.append(new)
        return 0
    new.close()
    if old is None:
        raise Refusal(errno.ENOENT, "ioeventfd.none", address=address, size=size)
    kvm.io_devices.remove(old)
    old.close()
    return 0


async def register_coalesced(call: Call, argument: int) -> int:
    """KVM_REGISTER_COALESCED_MMIO. Raises: Refusal EINVAL `coalesced.zone`."""
    start, size, pio = await _zone(call, argument)
    assert isinstance(call.file, VmFile)
    call.kvm.io_devices.append(CoalescedZone(call.file.ring, start, size, bool(pio)))
    return 0


async def unregister_coalesced(call: Call, argument: int) -> int:
    """KVM_UNREGISTER_COALESCED_MMIO: every zone inside the range goes."""
    start, size, pio = await _zone(call, argument)
    kvm = call.kvm
    for device in list(kvm.io_devices):
        if isinstance(device, CoalescedZone):
            at, length, is_port = device.key
            if is_port == bool(pio) and start <= at and at + length <= start + size:
                kvm.io_devices.remove(device)
    return 0


async def _zone(call: Call, argument: int) -> tuple[int, int, int]:
    start, size, pio = _ZONE.unpack(await call.client.memory.copy_from_user(argument, _ZONE.size))
    if pio not in (0, 1):
        raise Refusal(errno.EINVAL, "coalesced.zone", start=start, size=size, pio=pio)
    return start, size, pio
