"""What a CPU's block says of its last stop, as the dataclasses of `engine`, and answers the other way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from guestmem.cpu.block import ANSWER_MMIO, ANSWER_RAISE, ANSWER_VALUE, ANY, PRIVATE, CpuBlock, CpuStop
from guestmem.cpu.engine import (
    Debug,
    Failed,
    Halt,
    HostFault,
    Hypercall,
    InterruptWindow,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Pvalidate,
    ReadMsr,
    Rmpadjust,
    Shutdown,
    SliceOver,
    Stage2Miss,
    Stop,
    Tdcall,
    Vmgexit,
    WriteMsr,
)

(
    NONE, SLICE, KICKED, SIGNAL, MISS, HOST_FAULT, PORT_OUT, PORT_IN, MMIO_READ, MMIO_WRITE, HALT, WINDOW, RDMSR, WRMSR,
    HYPERCALL, PVALIDATE, RMPADJUST, VMGEXIT, TDCALL, DEBUG, SHUTDOWN, FAILED,
) = range(22)  # fmt: skip
"""enum cpu_stop_kind."""

_MASK_64 = (1 << 64) - 1


def decode(block: CpuBlock) -> Stop:
    """The stop that `block.stop` describes; KICKED and SIGNAL are SliceOver: run again."""
    return _DECODERS[block.stop.kind](block.stop, block)


def asserted_kind(stop: CpuStop) -> bool | None:
    """Whether the guest asserts a private page; None where it cannot say."""
    return None if stop.access == ANY else stop.access == PRIVATE


def answer_value(block: CpuBlock, value: int) -> None:
    """`value` for the last stop, applied at the next entry."""
    answer, stop = block.answer, block.stop
    if stop.kind in (PORT_IN, MMIO_READ):
        size = stop.size * (stop.count if stop.kind == PORT_IN else 1)
        data = (value & (1 << size * 8) - 1).to_bytes(max(size, 8), "little")
        ctypes.memmove(answer.data, data, len(data))
    else:
        answer.value = value & _MASK_64
    answer.kind = ANSWER_VALUE


def answer_raise(block: CpuBlock, vector: int, error_code: int) -> None:
    """The instruction of the last stop raises an exception instead, at the next entry."""
    block.answer.vector, block.answer.error_code = vector, error_code
    block.answer.kind = ANSWER_RAISE


def answer_mmio(block: CpuBlock, gpa: int) -> None:
    """What the instruction that missed does to the page of `gpa` is MMIO."""
    block.answer.value = gpa
    block.answer.kind = ANSWER_MMIO


def _value(stop: CpuStop, size: int) -> int:
    return int.from_bytes(ctypes.string_at(stop.data, size), "little")


def _miss(stop: CpuStop, _block: CpuBlock) -> Stop:
    return Stage2Miss(stop.gpa, bool(stop.write), bool(stop.fetch), asserted_kind(stop))


def _hypercall(stop: CpuStop, _block: CpuBlock) -> Stop:
    a, b, c, d = stop.value
    return Hypercall(stop.nr, (a, b, c, d), stop.cpl)


def _rmpadjust(stop: CpuStop, _block: CpuBlock) -> Stop:
    attributes = stop.value[0]
    return Rmpadjust(
        stop.gpa, bool(stop.large), attributes & 0xFF, attributes >> 8 & 0xFF, vmsa=bool(attributes >> 16 & 1)
    )


_DECODERS: dict[int, Callable[[CpuStop, CpuBlock], Stop]] = {
    SLICE: lambda s, b: SliceOver(),
    KICKED: lambda s, b: SliceOver(),
    SIGNAL: lambda s, b: SliceOver(),
    MISS: _miss,
    HOST_FAULT: lambda s, b: HostFault(s.hva, s.gpa, bool(s.write)),
    PORT_OUT: lambda s, b: PortOut(s.port, s.size, _value(s, s.size)),
    PORT_IN: lambda s, b: PortIn(s.port, s.size, s.count),
    MMIO_READ: lambda s, b: MmioRead(s.gpa, s.size),
    MMIO_WRITE: lambda s, b: MmioWrite(s.gpa, s.size, _value(s, s.size)),
    HALT: lambda s, b: Halt(),
    WINDOW: lambda s, b: InterruptWindow(),
    RDMSR: lambda s, b: ReadMsr(s.nr),
    WRMSR: lambda s, b: WriteMsr(s.nr, s.value[0]),
    HYPERCALL: _hypercall,
    PVALIDATE: lambda s, b: Pvalidate(s.gpa, bool(s.large), bool(s.validate)),
    RMPADJUST: _rmpadjust,
    VMGEXIT: lambda s, b: Vmgexit(s.value[0]),
    TDCALL: lambda s, b: Tdcall(s.nr),
    DEBUG: lambda s, b: Debug(s.nr, s.value[0], s.value[1], s.value[2]),
    SHUTDOWN: lambda s, b: Shutdown(),
    FAILED: lambda s, b: Failed(b.regs.rip, s.why.decode()),
}
