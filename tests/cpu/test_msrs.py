"""Model-specific registers, from the side of the guest and of the VMM."""

from __future__ import annotations

import pytest

from guestmem.cpu import msrs
from guestmem.cpu.cpuid import DEFAULT_CPUID
from guestmem.cpu.engine import Halt, ReadMsr, WriteMsr
from guestmem.cpu.registers import DebugRegisters, DescriptorTable
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, Memory, run, start_long

HLT, RDMSR, WRMSR, RDTSC, RDTSCP = b"\xf4", b"\x0f\x32", b"\x0f\x30", b"\x0f\x31", b"\x0f\x01\xf9"
IDT, HANDLER = 0x20000, 0x9000
VALUE = 0x0000_1234_5678_9ABC
UNKNOWN = 0x1234_5678


def start(engine: UnicornEngine, memory: Memory, code: bytes, index: int = 0, value: int = 0) -> None:
    """#GP halts at HANDLER."""
    start_long(engine, memory, code + HLT)
    memory.write(HANDLER, HLT)
    memory.write(IDT + 13 * 16, (HANDLER | 8 << 16 | 0x8E << 40).to_bytes(16, "little"))
    sregs = engine.get_sregs()
    sregs.idt = DescriptorTable(IDT, 0xFFF)
    engine.set_sregs(sregs)
    regs = engine.get_regs()
    regs.rcx, regs.rax, regs.rdx = 0xFFFF_0000_0000_0000 | index, value & 0xFFFF_FFFF, value >> 32
    engine.set_regs(regs)


def outcome(engine: UnicornEngine) -> int | None:
    """EDX:EAX, or None after #GP at the instruction."""
    assert run(engine) == Halt()
    regs = engine.get_regs()
    return None if regs.rip == HANDLER + 1 else regs.rdx << 32 | regs.rax


@pytest.mark.parametrize("index", sorted(set(msrs.SAVED) - {msrs.TSC, msrs.PAT}), ids=hex)
def test_saved_registers_go_through(engine: UnicornEngine, memory: Memory, index: int) -> None:
    """By the VMM and by the guest, one sees what the other has set."""
    assert engine.get_msr(index) is not None
    value = 0x1234 if index == 0x174 else VALUE
    assert engine.set_msr(index, value)
    assert engine.get_msr(index) == value
    start(engine, memory, RDMSR, index)
    assert outcome(engine) == value
    start(engine, memory, WRMSR, index, value + 1)
    outcome(engine)
    assert engine.get_msr(index) == value + 1


@pytest.mark.parametrize("code", [RDMSR, WRMSR, b"\x66\x48" + RDMSR])
def test_unknown_register(engine: UnicornEngine, memory: Memory, code: bytes) -> None:
    start(engine, memory, code, UNKNOWN)
    assert outcome(engine) is None
    assert memory.word(0x8000 - 48) == 0, "error code"
    assert memory.word(0x8000 - 40) == CODE
    assert engine.get_msr(UNKNOWN) is None
    assert not engine.set_msr(UNKNOWN, 0)


def test_prefixes_belong_to_the_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x66\x48" + RDMSR, msrs.MISC_ENABLE)
    assert outcome(engine) == 1
    assert engine.get_regs().rip == CODE + 5


def test_constants(engine: UnicornEngine, memory: Memory) -> None:
    assert engine.get_msr(msrs.MTRR_CAP) == 0x508
    assert engine.set_msr(msrs.MTRR_CAP, 0x508)
    assert not engine.set_msr(msrs.MTRR_CAP, 0x509)
    start(engine, memory, WRMSR, msrs.MTRR_CAP, 0x508)
    assert outcome(engine) is None


@pytest.mark.parametrize("index", [msrs.FS_BASE, msrs.KERNEL_GS_BASE, 0xC000_0082, 0x175], ids=hex)
def test_addresses_are_canonical(engine: UnicornEngine, memory: Memory, index: int) -> None:
    for good in (0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000):
        assert engine.set_msr(index, good)
    for bad in (0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF):
        assert not engine.set_msr(index, bad)
    assert engine.get_msr(index) == 0xFFFF_8000_0000_0000


def test_pat_has_memory_types(engine: UnicornEngine) -> None:
    assert engine.get_msr(msrs.PAT) == 0x0007040600070406
    assert engine.set_msr(msrs.PAT, 0x0606060606060606)
    assert not engine.set_msr(msrs.PAT, 0x0206060606060606)


class TestStops:
    """Registers that are somebody else's: SYSENTER_CS and _ESP, and with `unknown` those that nobody has."""

    @pytest.fixture(autouse=True)
    def stops(self, engine: UnicornEngine) -> None:
        engine.set_stop_msrs((range(0x174, 0x176),), unknown=True)

    @pytest.mark.parametrize("index", [0x174, 0x175, UNKNOWN], ids=hex)
    @pytest.mark.parametrize("code", [RDMSR, b"\x66\x48" + RDMSR])
    def test_read(self, engine: UnicornEngine, memory: Memory, index: int, code: bytes) -> None:
        start(engine, memory, code, index)
        assert run(engine) == ReadMsr(index)
        assert engine.get_regs().rip == CODE
        assert run(engine) == ReadMsr(index), "without an answer it is repeated"
        engine.complete(VALUE)
        regs = engine.get_regs()
        assert (regs.rip, regs.rdx << 32 | regs.rax) == (CODE + len(code), VALUE)
        assert outcome(engine) == VALUE

    @pytest.mark.parametrize("index", [0x174, UNKNOWN], ids=hex)
    def test_write(self, engine: UnicornEngine, memory: Memory, index: int) -> None:
        before = engine.get_msr(index)
        start(engine, memory, WRMSR, index, VALUE)
        assert run(engine) == WriteMsr(index, VALUE)
        engine.complete(1)
        assert engine.get_regs().rip == CODE + len(WRMSR)
        assert outcome(engine) == VALUE
        assert engine.get_msr(index) == before

    @pytest.mark.parametrize("code", [RDMSR, WRMSR])
    def test_refused(self, engine: UnicornEngine, memory: Memory, code: bytes) -> None:
        start(engine, memory, code, 0x174)
        assert isinstance(run(engine), ReadMsr | WriteMsr)
        engine.raise_exception(13, 0)
        assert outcome(engine) is None
        assert memory.word(0x8000 - 40) == CODE

    def test_others_do_not_stop(self, engine: UnicornEngine, memory: Memory) -> None:
        engine.set_stop_msrs((range(0x174, 0x176),))
        for index, value in ((0x176, 0), (UNKNOWN, None)):
            start(engine, memory, RDMSR, index)
            assert outcome(engine) == value

    def test_another_rip_voids_the_answer(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, RDMSR, 0x174)
        run(engine)
        regs = engine.get_regs()
        regs.rip = CODE + len(RDMSR)
        engine.set_regs(regs)
        engine.complete(VALUE)
        assert outcome(engine) == 0


class TestEfer:
    def test_long_mode_cannot_be_left_with_paging(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, WRMSR, msrs.EFER, 0x801)
        assert outcome(engine) is None
        assert not engine.set_msr(msrs.EFER, 0x801)
        assert engine.get_sregs().efer == 0x500

    def test_active_is_not_writable(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, WRMSR + RDMSR, msrs.EFER, 0x901)
        assert outcome(engine) == 0xD01
        assert engine.get_msr(msrs.EFER) == engine.get_sregs().efer == 0xD01

    def test_reserved(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, WRMSR, msrs.EFER, 0x1501)  # SVME
        assert outcome(engine) is None
        assert not engine.set_msr(msrs.EFER, 0x1501)

    def test_no_nx_without_cpuid(self, engine: UnicornEngine, memory: Memory) -> None:
        eax, ebx, ecx, edx = DEFAULT_CPUID[0x8000_0001, 0]
        engine.set_cpuid({**DEFAULT_CPUID, (0x8000_0001, 0): (eax, ebx, ecx, edx & ~(1 << 20))})
        start(engine, memory, WRMSR, msrs.EFER, 0x900)
        assert outcome(engine) is None


class TestTsc:
    def test_goes_on(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, RDTSC)
        seen = []
        for _ in range(5):
            regs = engine.get_regs()
            regs.rip = CODE
            engine.set_regs(regs)
            before = engine.get_msr(msrs.TSC)
            value = outcome(engine)
            assert before is not None
            assert value is not None
            seen += [before, value]
        assert seen == sorted(seen)

    def test_set_by_the_vmm(self, engine: UnicornEngine, memory: Memory) -> None:
        assert engine.set_msr(msrs.TSC, 1 << 60)
        start(engine, memory, RDTSC)
        value = outcome(engine)
        assert value is not None
        assert value >= 1 << 60
        assert engine.get_msr(msrs.TSC_ADJUST) == 0

    def test_set_by_the_guest(self, engine: UnicornEngine, memory: Memory) -> None:
        before = engine.get_msr(msrs.TSC)
        start(engine, memory, WRMSR, msrs.TSC, 1 << 60)
        outcome(engine)
        after, adjust = engine.get_msr(msrs.TSC), engine.get_msr(msrs.TSC_ADJUST)
        assert before is not None
        assert after is not None
        assert adjust is not None
        assert after >= 1 << 60
        assert 0 < adjust <= (1 << 60) - before

    def test_rdtscp(self, engine: UnicornEngine, memory: Memory) -> None:
        assert engine.set_msr(msrs.TSC_AUX, 0xABCD)
        start(engine, memory, RDTSCP)
        assert outcome(engine)
        assert engine.get_regs().rcx == 0xABCD

    def test_two_vcpus_agree(self, engine: UnicornEngine, memory: Memory) -> None:
        other = UnicornEngine(memory)
        values = [each.get_msr(msrs.TSC) or 0 for each in (engine, other, engine)]
        other.close()
        assert values == sorted(values)


def test_debug_registers(engine: UnicornEngine, memory: Memory) -> None:
    assert engine.get_debug_registers() == DebugRegisters()
    registers = DebugRegisters((1, 2, 3, 1 << 63), 0xFFFF0FF1, 0x700)
    engine.set_debug_registers(registers)
    assert engine.get_debug_registers() == registers
    start(engine, memory, b"\x0f\x21\xd8\xe6\x80")  # mov rax, dr3; out
    run(engine)
    assert engine.get_regs().rax == 1 << 63
    assert engine.get_debug_registers() == registers, "a port exit uses them"
    for wrong in (DebugRegisters(dr6=1 << 32), DebugRegisters(dr7=1 << 32)):
        with pytest.raises(ValueError, match="32 bits"):
            engine.set_debug_registers(wrong)


def test_ports_stop_exactly_whatever_dr7_says(engine: UnicornEngine, memory: Memory) -> None:
    """mov dr7, rax; out 0x80, al; inc qword [DATA]: the breakpoint that makes the exit exact is asked for again."""
    start(engine, memory, b"\x0f\x23\xf8\xe6\x80\x48\xff\x04\x25\x00\x50\x00\x00", value=0x400)
    for _ in range(3):
        regs = engine.get_regs()
        regs.rip = CODE
        engine.set_regs(regs)
        run(engine)
        assert (engine.get_regs().rip, memory.word(DATA)) == (CODE + 5, 0)


def test_closed(memory: Memory) -> None:
    engine = UnicornEngine(memory)
    engine.close()
    for call in (engine.get_fpu, engine.get_events, engine.get_debug_registers, engine.get_xcr0, engine.queue_nmi):
        with pytest.raises(ValueError, match="closed"):
            call()
