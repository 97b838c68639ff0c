"""The block: every register goes through the CPU and comes back, and another ABI is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestmem.cpu import block as b
from guestmem.cpu.registers import DebugRegisters, DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine

U64 = st.integers(0, (1 << 64) - 1)
LINEAR = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def segments() -> st.SearchStrategy[Segment]:
    bit = st.integers(0, 1)
    fields = {
        "base": U64,
        "limit": st.integers(0, (1 << 32) - 1),
        "selector": st.integers(0, 0xFFFF),
        "type": st.integers(0, 15),
        "dpl": st.integers(0, 3),
        "present": bit,
        **dict.fromkeys(("db", "s", "l", "g", "avl"), bit),
    }
    built = st.fixed_dictionaries(fields).map(lambda values: Segment(**values))
    return built.map(lambda segment: dataclasses.replace(segment, unusable=1 - segment.present))


TABLES = st.builds(DescriptorTable, U64, st.integers(0, 0xFFFF))
SREGS = st.builds(
    Sregs,
    **{name: segments() for name in b.SEGMENTS},
    gdt=TABLES,
    idt=TABLES,
    cr0=st.integers(0, (1 << 32) - 1),
    cr2=U64,
    cr3=U64,
    cr4=st.integers(0, (1 << 32) - 1),
    cr8=st.integers(0, 15),
    efer=st.integers(0, 0xFFFF),
)
REGS = st.builds(
    Regs,
    **dict.fromkeys(b.REG_NAMES[:-1], U64),
    rflags=st.integers(0, (1 << 22) - 1).map(lambda value: value & ~0x28 | 2),
)


def settle(engine: UnicornEngine) -> None:
    """Everything into the CPU and back, without an instruction."""
    engine._library.cpu_settle(engine._cpu)


@LINEAR
@given(sregs=SREGS, regs=REGS)
def test_round_trip_through_the_cpu(engine: UnicornEngine, sregs: Sregs, regs: Regs) -> None:
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    settle(engine)
    assert engine.block.dirty == 0
    ctypes.memset(ctypes.addressof(engine.block.regs), 0x55, ctypes.sizeof(b.KvmRegs))
    ctypes.memset(ctypes.addressof(engine.block.sregs), 0x55, b.KvmSregs.apic_base.offset)
    settle(engine)
    assert engine.get_sregs() == sregs
    assert engine.get_regs() == regs


def test_unusable_is_not_present(engine: UnicornEngine) -> None:
    sregs = engine.get_sregs()
    sregs.ldt.present, sregs.ldt.unusable = 1, 1
    engine.set_sregs(sregs)
    settle(engine)
    ldt = engine.get_sregs().ldt
    assert (ldt.present, ldt.unusable) == (0, 1)


def test_debug_registers(engine: UnicornEngine) -> None:
    registers = DebugRegisters((1, 2, 3, 4), 0xFFFF0FF1, 0x402)
    engine.set_debug_registers(registers)
    settle(engine)
    ctypes.memset(ctypes.addressof(engine.block.debug), 0x55, 48)
    settle(engine)
    assert engine.get_debug_registers() == registers


def test_a_block_of_another_abi_is_refused() -> None:
    library, block = b.library(), b.CpuBlock()
    library.cpu_block_init(ctypes.byref(block))
    block.abi += 1
    space = library.cpu_space_create()
    assert library.cpu_create(space, ctypes.byref(block)) is None
    assert "another ABI" in b.last_error()
    library.cpu_space_destroy(space)


def test_without_the_library_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    b.library.cache_clear()
    monkeypatch.setattr(b, "LIBRARY", b.LIBRARY.with_name("none.so"))
    assert "built at installation, by gcc" in (b.missing() or "")
    monkeypatch.undo()
    b.library.cache_clear()
    assert b.missing() is None


def test_sixteen_cpus_with_all_memory_locked() -> None:
    """RLIMIT_AS of 4 GiB, and mlockall(MCL_FUTURE) where that is allowed."""
    program = """
import ctypes, mmap, resource
from guestmem.cpu import block as b
ctypes.CDLL(None).mlockall(2)
try:
    mmap.mmap(-1, 1 << 30).close()
except OSError:
    ctypes.CDLL(None).munlockall()  # it was allowed, up to RLIMIT_MEMLOCK
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
library, space, kept = b.library(), b.library().cpu_space_create(), []
for _ in range(16):
    block = b.CpuBlock()
    library.cpu_block_init(ctypes.byref(block))
    kept.append((block, library.cpu_create(space, ctypes.byref(block))))
    assert kept[-1][1], b.last_error()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
