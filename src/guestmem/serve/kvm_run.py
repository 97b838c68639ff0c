"""struct kvm_run: the memory that a vCPU shares with its VMM, filled in at each exit and read at each entry.

Three pages, as on x86: the structure, the page of port data, the ring of coalesced MMIO (KVM_COALESCED_MMIO_PAGE_OFFSET
is 2). Offsets are those of include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct

from guestmem.kvm.exits import (
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    IrqWindowOpenExit,
    LeftExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
)
from guestmem.uapi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE

PAGES = 3
SIZE = PAGES * mmap.PAGESIZE
IO_DATA_OFFSET = mmap.PAGESIZE

EXIT_IO, EXIT_HYPERCALL, EXIT_HLT, EXIT_MMIO, EXIT_IRQ_WINDOW_OPEN, EXIT_SHUTDOWN = 2, 3, 5, 6, 7, 8
EXIT_FAIL_ENTRY, EXIT_INTR, EXIT_INTERNAL_ERROR, EXIT_SYSTEM_EVENT = 9, 10, 17, 24
EXIT_MEMORY_FAULT = 39
INTERNAL_ERROR_EMULATION = 1
_ENTRY_FAILED = (1 << 64) - 1  # SVM_EXIT_ERR
_IO_OUT = 1

_IMMEDIATE_EXIT = 1
_EXIT_REASON = struct.Struct("<I")
_EXIT_REASON_AT = 8
_UNION_AT = 32
_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
_MMIO_DATA = slice(_UNION_AT + 8, _UNION_AT + 16)
_HYPERCALL = struct.Struct("<Q6QQQ")  # nr, args, ret, flags
_HYPERCALL_RET = struct.Struct("<Q")
_HYPERCALL_RET_AT = _UNION_AT + 8 + 6 * 8
_MEMORY_FAULT = struct.Struct("<QQQ")  # flags, gpa, size
_FAIL_ENTRY = struct.Struct("<QI")  # hardware_entry_failure_reason, cpu
_SYSTEM_EVENT = struct.Struct("<II16Q")  # type, ndata, data
_INTERNAL = struct.Struct("<II16Q")  # suberror, ndata, data
_STATE = struct.Struct("<BB")  # ready_for_interrupt_injection, if_flag
_STATE_AT = 12


class KvmRun:
    """The shared memory of one vCPU. `fd` is what clients map."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guestmem:kvm_run", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self.memory = mmap.mmap(self.fd, SIZE)

    @property
    def immediate_exit(self) -> bool:
        return bool(self.memory[_IMMEDIATE_EXIT])

    @property
    def request_interrupt_window(self) -> bool:
        return bool(self.memory[0])

    def answer(self, exit_: Exit | None) -> None:
        """Take what the VMM filled in for the last exit."""
        match exit_:
            case IoExit(is_write=False):
                length = exit_.size * exit_.count
                exit_.data = int.from_bytes(self.memory[IO_DATA_OFFSET : IO_DATA_OFFSET + length], "little")
            case MmioExit(is_write=False):
                exit_.data = int.from_bytes(self.memory[_MMIO_DATA][: exit_.size], "little")
            case HypercallExit():
                (exit_.ret,) = _HYPERCALL_RET.unpack_from(self.memory, _HYPERCALL_RET_AT)

    def write(self, exit_: Exit) -> int:
        """Say why KVM_RUN came back; the errno that it fails with, 0 for success."""
        memory = self.memory
        match exit_:
            case IoExit():
                reason, error = EXIT_IO, 0
                direction = _IO_OUT if exit_.is_write else 0
                _IO.pack_into(memory, _UNION_AT, direction, exit_.size, exit_.port, exit_.count, IO_DATA_OFFSET)
                if exit_.is_write:
                    memory[IO_DATA_OFFSET : IO_DATA_OFFSET + exit_.size] = exit_.data.to_bytes(exit_.size, "little")
            case MmioExit():
                reason, error = EXIT_MMIO, 0
                data = exit_.data.to_bytes(8, "little") if exit_.is_write else bytes(8)
                _MMIO.pack_into(memory, _UNION_AT, exit_.gpa, data, exit_.size, exit_.is_write)
            case HypercallExit():
                reason, error = EXIT_HYPERCALL, 0
                # Bit 0 of flags: the guest was in long mode. ret is preset to 0, as ____kvm_emulate_hypercall does.
                _HYPERCALL.pack_into(memory, _UNION_AT, exit_.nr, *exit_.args, 0, 0, 0, 0, 1)
            case MemoryFaultExit():
                reason, error = EXIT_MEMORY_FAULT, exit_.refusal.errno or 0
                flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if exit_.private else 0
                _MEMORY_FAULT.pack_into(memory, _UNION_AT, flags, exit_.gpa, exit_.size)
            case LeftExit():
                return 0
            case IrqWindowOpenExit():
                reason, error = EXIT_IRQ_WINDOW_OPEN, 0
            case HltExit():
                reason, error = EXIT_HLT, 0
            case ShutdownExit():
                reason, error = EXIT_SHUTDOWN, 0
            case FailEntryExit():
                reason, error = EXIT_FAIL_ENTRY, 0
                _FAIL_ENTRY.pack_into(memory, _UNION_AT, _ENTRY_FAILED, 0)
            case SystemEventExit():
                reason, error = EXIT_SYSTEM_EVENT, 0
                padding = (0,) * (16 - len(exit_.data))
                _SYSTEM_EVENT.pack_into(memory, _UNION_AT, exit_.type, len(exit_.data), *exit_.data, *padding)
            case InternalErrorExit():
                reason, error = EXIT_INTERNAL_ERROR, 0
                _INTERNAL.pack_into(memory, _UNION_AT, INTERNAL_ERROR_EMULATION, 0, *(0,) * 16)
            case InterruptedExit(by_signal=False):
                return errno.EINTR
            case InterruptedExit():
                reason, error = EXIT_INTR, errno.EINTR
        _EXIT_REASON.pack_into(memory, _EXIT_REASON_AT, reason)
        return error

    def write_state(self, ready_for_interrupt: bool, if_flag: bool) -> None:
        """What every exit says besides: whether the guest takes interrupts."""
        _STATE.pack_into(self.memory, _STATE_AT, ready_for_interrupt, if_flag)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


_RING_AT = 2 * mmap.PAGESIZE
_RING_HEAD = struct.Struct("<II")  # first, last
_RING_ENTRY = struct.Struct("<QII8s")  # phys_addr, len, pio, data
_RING_MAX = (mmap.PAGESIZE - _RING_HEAD.size) // _RING_ENTRY.size


class CoalescedRing:
    """The ring of coalesced writes, in the third page of what the VM's first vCPU shares: there QEMU looks for it."""

    def __init__(self) -> None:
        self.run: KvmRun | None = None

    def put(self, address: int, size: int, value: int, is_port: bool) -> bool:
        """Append a write; False if the ring is full. Source: coalesced_mmio_write."""
        if self.run is None:
            return False
        memory = self.run.memory
        first, last = (index % _RING_MAX for index in _RING_HEAD.unpack_from(memory, _RING_AT))
        after = (last + 1) % _RING_MAX
        if after == first:
            return False
        at = _RING_AT + _RING_HEAD.size + last * _RING_ENTRY.size
        _RING_ENTRY.pack_into(memory, at, address, size, is_port, value.to_bytes(8, "little"))
        _RING_HEAD.pack_into(memory, _RING_AT, first, after)
        return True
