"""Instructions that CR4 allows or forbids, and that CPUID tells of what executes."""

from __future__ import annotations

import pytest

from guestmem.cpu.cpuid import DEFAULT_CPUID, lookup
from guestmem.cpu.engine import Halt, Shutdown
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, Memory, assemble, run, start_long

OSFXSR, FSGSBASE = 1 << 9, 1 << 16
GENERAL = {
    "shlx rax, rsi, rdi": 0b1100_0000,
    "shlx eax, esi, edi": 0b1100_0000,
    "shrx rax, rsi, rdi": 0,
    "adcx rax, rsi": 0b1100 + 0x1000,
    "adox rax, rsi": 0b1100 + 0x1000,
    "andn rax, rdi, rsi": 0b1000,
    "bzhi rax, rsi, rdi": 0b1100,
    "pext rax, rsi, rdi": 1,
    "pdep rax, rsi, rdi": 0,
    "rorx rax, rsi, 2": 3,
    "blsr rax, rsi": 0b1000,
    "popcnt rax, rsi": 2,
}
"""By instruction the RAX that it leaves, of RAX 0x1000, RSI 0b1100 and RDI 4."""


def execute(engine: UnicornEngine, memory: Memory, source: str, cr4: int) -> object:
    start_long(engine, memory, assemble(source) + b"\xf4")
    sregs, regs = engine.get_sregs(), engine.get_regs()
    sregs.cr4 = sregs.cr4 & ~(OSFXSR | FSGSBASE) | cr4
    regs.rax, regs.rsi, regs.rdi = 0x1000, 0b1100, 4
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    return run(engine)


@pytest.mark.parametrize("cr4", [0, OSFXSR])
@pytest.mark.parametrize("source", GENERAL)
def test_instructions_of_general_registers(engine: UnicornEngine, memory: Memory, source: str, cr4: int) -> None:
    """They do not depend on CR4.OSFXSR. Source: Intel SDM vol. 2, SHLX, ADCX: exceptions."""
    assert execute(engine, memory, source, cr4) == Halt()
    assert engine.get_regs().rax == GENERAL[source]


@pytest.mark.parametrize(
    "source", ["movups xmm0, [rsp - 64]", "pshufb xmm0, xmm1", "paddd xmm0, xmm1", "ldmxcsr [rsp]"]
)
def test_sse_needs_osfxsr(engine: UnicornEngine, memory: Memory, source: str) -> None:
    """Without, #UD, which without an IDT is the end."""
    memory.set_word(0x8000, 0x1F80)
    assert execute(engine, memory, source, 0) == Shutdown()
    assert execute(engine, memory, source, OSFXSR) == Halt()


def test_sse_beside_what_needs_nothing(engine: UnicornEngine, memory: Memory) -> None:
    """In one block: the instruction after SHLX is looked at for itself."""
    assert execute(engine, memory, "shlx rax, rsi, rdi; paddd xmm0, xmm1", 0) == Shutdown()
    assert (engine.get_regs().rip, engine.get_regs().rax) == (CODE + 5, 0b1100_0000)


@pytest.mark.parametrize("source", ["wrfsbase rsi; rdfsbase rax", "wrgsbase rsi; rdgsbase rax"])
def test_fsgsbase(engine: UnicornEngine, memory: Memory, source: str) -> None:
    assert execute(engine, memory, source, 0) == Shutdown()
    assert execute(engine, memory, source, FSGSBASE) == Halt()
    assert engine.get_regs().rax == 0b1100


def test_rdrand(engine: UnicornEngine, memory: Memory) -> None:
    assert lookup(DEFAULT_CPUID, 1, 0)[2] >> 30 & 1
    assert execute(engine, memory, "rdrand rax; setc dl; rdrand rbx", 0) == Halt()
    regs = engine.get_regs()
    assert regs.rdx & 1
    assert regs.rax != regs.rbx
