"""irqfd: an eventfd that raises a GSI, and with resampling a second one that tells when the guest has ended it.

    somebody writes the eventfd -> the server's loop -> an edge on the GSI
    with resampling             -> the GSI stays up  -> the guest's EOI -> GSI down, resamplefd written -> the device
                                                        that still wants service writes the eventfd again

What a client names is a descriptor of its own; the server watches a duplicate, so closing the client's changes nothing,
where the kernel ends an irqfd with the eventfd's last descriptor. An eventfd is known by the number that the kernel
gives it.

Source: virt/kvm/eventfd.c kvm_irqfd_assign, kvm_irqfd_deassign, irqfd_inject, irqfd_resampler_ack.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
from typing import TYPE_CHECKING, cast

from guestmem.kvm.irqchip import RESAMPLE_SOURCE, USERSPACE_SOURCE, IrqChip
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.call import Call
    from guestmem.serve.files import VmFile
    from guestmem.serve.server import Server

_IRQFD = struct.Struct("<IIII16x")  # fd, gsi, flags, resamplefd
_DEASSIGN, _RESAMPLE = 1, 2


def eventfd_id(fd: int) -> int | None:
    """The kernel's number of the eventfd behind a descriptor of ours; None if it is something else."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        for line in lines:
            if line.startswith("eventfd-id:"):
                return int(line.split()[1])
    return None


def signal(fd: int) -> None:
    """Add one to an eventfd of a client's, without waiting: at its largest value it stays, and is readable, which is
    all that counts.

    A write blocks there unless the client has made the descriptor non-blocking, which is not ours to do, and eventfds
    take no RWF_NOWAIT for writes. So it is looked at first; a client that fills it in between holds the server up.
    """
    room = select.poll()
    room.register(fd, select.POLLOUT)
    if room.poll(0):
        with contextlib.suppress(OSError):  # no eventfd: the kernel does not look either
            os.eventfd_write(fd, 1)


class Resampler:
    """The irqfds with resampling of one GSI: they share the line, and all hear of its end."""

    def __init__(self, irqchip: IrqChip, gsi: int) -> None:
        self._irqchip = irqchip
        self.gsi = gsi
        self.fds: list[int] = []
        irqchip.add_ack_listener(gsi, self.acked)

    def acked(self) -> None:
        self._irqchip.set_irq(self.gsi, RESAMPLE_SOURCE, False)
        for fd in self.fds:
            signal(fd)

    def close(self) -> None:
        self._irqchip.set_irq(self.gsi, RESAMPLE_SOURCE, False)
        self._irqchip.remove_ack_listener(self.gsi, self.acked)


class IrqFd:
    """One of them. `fd` and `resample_fd` are ours to close."""

    def __init__(self, irqchip: IrqChip, fd: int, identity: int, gsi: int) -> None:
        self._irqchip = irqchip
        self.fd = fd
        self.identity = identity
        self.gsi = gsi
        self.resampler: Resampler | None = None
        self.resample_fd = -1

    def signalled(self) -> None:
        """The eventfd can be read: its count goes, however high, as the kernel's wait-queue entry takes it."""
        try:
            os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)  # O_NONBLOCK would be the client's as well
        except BlockingIOError:
            return  # a reader of the client's was faster
        if self.resampler is not None:
            self._irqchip.set_irq(self.gsi, RESAMPLE_SOURCE, True)
        else:
            self._irqchip.pulse(self.gsi, USERSPACE_SOURCE)


class IrqFds:
    """The irqfds of one VM."""

    def __init__(self) -> None:
        self._by_identity: dict[int, IrqFd] = {}
        self._resamplers: dict[int, Resampler] = {}

    def assign(self, server: Server, irqchip: IrqChip, fds: tuple[int, int], gsi: int) -> None:
        """`fds` are the eventfd and the resamplefd (-1: none), both taken over. Raises: Refusal EINVAL
        `irqfd.no_eventfd`; EBUSY `irqfd.exists`."""
        fd, resample_fd = fds
        try:
            identity = _identify(fd)
            if resample_fd >= 0:
                _identify(resample_fd)
            if identity in self._by_identity:
                raise Refusal(errno.EBUSY, "irqfd.exists", gsi=gsi)
        except Refusal:
            _close(fds)
            raise
        new = self._by_identity[identity] = IrqFd(irqchip, fd, identity, gsi)
        if resample_fd >= 0:
            new.resampler = self._resamplers.get(gsi) or Resampler(irqchip, gsi)
            self._resamplers[gsi] = new.resampler
            new.resample_fd = resample_fd
            new.resampler.fds.append(resample_fd)
        server.watch(fd, new.signalled)

    def deassign(self, server: Server, fd: int, gsi: int) -> None:
        """Takes `fd` over. One that is not there is no error. Raises: Refusal EINVAL `irqfd.no_eventfd`."""
        try:
            identity = _identify(fd)
        finally:
            os.close(fd)
        found = self._by_identity.get(identity)
        if found is not None and found.gsi == gsi:
            self._remove(server, found)

    def close(self, server: Server) -> None:
        """The VM's descriptor is gone. Source: kvm_irqfd_release."""
        for irqfd_ in list(self._by_identity.values()):
            self._remove(server, irqfd_)

    def _remove(self, server: Server, irqfd_: IrqFd) -> None:
        del self._by_identity[irqfd_.identity]
        server.unwatch(irqfd_.fd)
        resampler = irqfd_.resampler
        if resampler is not None:
            resampler.fds.remove(irqfd_.resample_fd)
            if not resampler.fds:
                resampler.close()
                del self._resamplers[resampler.gsi]
        _close((irqfd_.fd, irqfd_.resample_fd))


def _identify(fd: int) -> int:
    identity = eventfd_id(fd)
    if identity is None:
        raise Refusal(errno.EINVAL, "irqfd.no_eventfd", fd=fd)
    return identity


def _close(fds: tuple[int, int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


async def irqfd(call: Call, argument: int) -> int:
    """KVM_IRQFD.

    Raises: Refusal EINVAL `irqfd.flags`, `irqfd.no_irqchip`, `irqfd.no_eventfd`; EBADF `fd.not_open`; EBUSY
    `irqfd.exists`.
    """
    number, gsi, flags, resample = _IRQFD.unpack(await call.client.memory.copy_from_user(argument, _IRQFD.size))
    file = cast("VmFile", call.file)
    irqchip = file.kvm.irqchip
    if flags & ~(_DEASSIGN | _RESAMPLE):
        raise Refusal(errno.EINVAL, "irqfd.flags", flags=flags)
    if flags & _DEASSIGN:
        file.irqfds.deassign(call.server, await call.take_descriptor(number), gsi)
        return 0
    if irqchip is None or (flags & _RESAMPLE and irqchip.is_split):
        raise Refusal(errno.EINVAL, "irqfd.no_irqchip", flags=flags)
    fd, resample_fd = await call.take_descriptor(number), -1
    if flags & _RESAMPLE:
        try:
            resample_fd = await call.take_descriptor(resample)
        except Refusal:
            os.close(fd)
            raise
    file.irqfds.assign(call.server, irqchip, (fd, resample_fd), gsi)
    return 0
