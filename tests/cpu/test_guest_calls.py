"""Hypercalls and the instructions of protected guests: their encodings, executed. Each row has its source.

APM3: AMD64 Architecture Programmer's Manual volume 3, at the instruction. GAS: binutils gas/testsuite/gas/i386.
"""

from __future__ import annotations

import pytest

from guestmem.cpu.engine import (
    Halt,
    Hypercall,
    PageBit,
    Pvalidate,
    Rmpadjust,
    Stage2Miss,
    Stop,
    Tdcall,
    Vmgexit,
)
from guestmem.cpu.msrs import GHCB, SEV_STATUS
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, GP, PAGE, PF, TABLES, UD, Memory, run, start_long, start_real
from tests.cpu.protected_guest import (
    C_BIT,
    HLT,
    PVALIDATE,
    RMPADJUST,
    SHARED_BIT,
    TDCALL,
    VMCALL,
    VMGEXIT,
    VMGEXIT_REPNE,
    VMMCALL,
    Start,
)

RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
def test_hypercall(engine: UnicornEngine, memory: Memory, instruction: bytes) -> None:
    start_long(engine, memory, instruction + HLT)
    regs = engine.get_regs()
    regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi = 12, 1 << 63, 3, 4, 5
    engine.set_regs(regs)
    assert run(engine) == Hypercall(12, (1 << 63, 3, 4, 5), cpl=0)
    assert engine.get_regs().rip == CODE + 3
    engine.complete((1 << 64) - 1000)
    assert run(engine) == Halt()
    after = engine.get_regs()
    assert (after.rax, after.rbx, after.rip) == ((1 << 64) - 1000, 1 << 63, CODE + 4)


def test_hypercall_outside_of_64_bit_code_is_cut_to_32(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, VMCALL + HLT)
    regs = engine.get_regs()
    regs.rax, regs.rsi = 0xFFFF_FFFF_0000_0001, 1 << 40
    engine.set_regs(regs)
    assert run(engine) == Hypercall(1, (0, 0, 0, 0))
    engine.complete(-1)
    assert engine.get_regs().rax == 0xFFFF_FFFF


def test_hypercall_from_ring_3_says_so(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, VMMCALL)
    sregs = engine.get_sregs()
    sregs.cs.dpl = sregs.ss.dpl = 3
    engine.set_sregs(sregs)
    assert run(engine) == Hypercall(0, (0, 0, 0, 0), cpl=3)


def test_hypercall_across_two_pages(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, VMCALL + HLT, 2 * PAGE - 1)
    assert run(engine) == Hypercall(0, (0, 0, 0, 0))
    assert engine.get_regs().rip == 2 * PAGE + 2
    assert run(engine) == Halt()


@pytest.mark.parametrize("prefix", [b"\x2e", b"\x48", b"\x67"], ids=["cs:", "rex.w", "addr32"])
def test_prefixes_without_meaning(engine: UnicornEngine, memory: Memory, prefix: bytes) -> None:
    start_long(engine, memory, prefix + VMMCALL + HLT)
    assert run(engine) == Hypercall(0, (0, 0, 0, 0))
    assert engine.get_regs().rip == CODE + 4
    assert run(engine) == Halt()


SNP_ROWS = [
    pytest.param(PVALIDATE, Pvalidate(DATA, large=False, validate=False), id="pvalidate: APM3, GAS x86-64-snp.d"),
    pytest.param(RMPADJUST, Rmpadjust(DATA, False, 0, 0, False), id="rmpadjust: APM3, GAS x86-64-snp.d"),
    pytest.param(VMGEXIT, Vmgexit(0), id="vmgexit F3: APM3, Linux VMGEXIT() is rep; vmmcall"),
    pytest.param(VMGEXIT_REPNE, Vmgexit(0), id="vmgexit F2: APM3"),
]


@pytest.mark.parametrize(("code", "stop"), SNP_ROWS)
def test_an_snp_guest_has_it(start: Start, code: bytes, stop: Stop) -> None:
    assert start(C_BIT, code, rax=DATA).run() == stop


def test_a_td_has_tdcall(start: Start) -> None:
    """Source: GAS x86-64-tdx.d; SDM volume 2, TDCALL."""
    guest = start(SHARED_BIT, TDCALL, rax=6)
    assert guest.run() == Tdcall(6)
    assert guest.engine.get_regs().rip == CODE
    assert guest.run() == Tdcall(6), "it is repeated until it is answered"
    guest.engine.complete(0)
    assert guest.engine.get_regs().rip == CODE + 4


@pytest.mark.parametrize(
    ("bit", "code"),
    [
        (None, PVALIDATE),
        (None, RMPADJUST),
        (None, TDCALL),
        (SHARED_BIT, PVALIDATE),
        (SHARED_BIT, RMPADJUST),
        (C_BIT, TDCALL),
    ],
)
def test_others_have_no_such_instruction(start: Start, bit: PageBit | None, code: bytes) -> None:
    """#UD without SNP: APM3; without SEAM: SDM volume 2, TDCALL."""
    assert start(bit, code, rax=DATA).exception() == (UD, None)


@pytest.mark.parametrize("bit", [None, SHARED_BIT], ids=["default", "td"])
@pytest.mark.parametrize("code", [VMGEXIT, VMGEXIT_REPNE])
def test_vmgexit_is_vmmcall_to_others(start: Start, bit: PageBit | None, code: bytes) -> None:
    """Source: APM3, VMGEXIT: in a guest without SEV-ES it behaves as VMMCALL."""
    assert start(bit, code, rax=12, rbx=1).run() == Hypercall(12, (1, 0, 0, 0))


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"\xf3\x0f\x01\xff", id="psmash: a hypervisor's, #UD in a guest (APM3)"),
        pytest.param(b"\xf2\x0f\x01\xfe", id="rmpupdate: a hypervisor's, #UD in a guest (APM3)"),
        pytest.param(b"\xf0" + PVALIDATE, id="lock (APM3, 1.2.5)"),
        pytest.param(b"\x0f\x01\xfe", id="invlpgb: not in CPUID"),
        pytest.param(b"\x66\x0f\x01\xc1", id="66 vmcall: NP (SDM volume 2)"),
    ],
)
def test_neighbours_are_invalid(start: Start, code: bytes) -> None:
    assert start(C_BIT, code, rax=DATA).exception() == (UD, None)


def test_plain_vmmcall_stays_a_hypercall(start: Start) -> None:
    assert start(C_BIT, VMMCALL, rax=12).run() == Hypercall(12, (0, 0, 0, 0))


@pytest.mark.parametrize(("bit", "code"), [(C_BIT, PVALIDATE), (C_BIT, RMPADJUST), (SHARED_BIT, TDCALL)])
def test_outside_of_ring_0(start: Start, bit: PageBit, code: bytes) -> None:
    """#GP(0): APM3 for the first two, SDM volume 2 for TDCALL."""
    guest = start(bit, code, rax=DATA)
    guest.ring_3()
    assert guest.exception() == (GP, 0)


class TestModes:
    def test_rmpadjust_is_of_64_bit_mode(self, start: Start) -> None:
        """#UD: APM3, RMPADJUST."""
        guest = start(C_BIT, RMPADJUST, rax=DATA)
        guest.compatibility_mode()
        assert guest.exception() == (UD, None)

    def test_pvalidate_is_not(self, start: Start) -> None:
        """Source: GAS snp.d, which is for 32 bits. EAX is the address."""
        guest = start(C_BIT, PVALIDATE, rax=1 << 40 | DATA)
        guest.compatibility_mode()
        assert guest.run() == Pvalidate(DATA, False, False)

    def test_pvalidate_without_paging(self) -> None:
        memory = Memory(page_bit=C_BIT)
        engine = UnicornEngine(memory)
        start_real(engine, memory, PVALIDATE)
        regs = engine.get_regs()
        regs.rax, regs.rdx = 0x1_5123, 1
        engine.set_regs(regs)
        assert run(engine) == Pvalidate(0x5000, False, True), "AX, in code of 16 bits"
        engine.close()
        memory.close()

    def test_address_size(self, start: Start) -> None:
        """Source: GAS x86-64-snp.d, addr32 pvalidate."""
        assert start(C_BIT, b"\x67" + PVALIDATE, rax=1 << 40 | DATA).run() == Pvalidate(DATA, False, False)

    def test_tdcall_is_of_64_bit_mode(self, start: Start) -> None:
        """#GP(0), by the module. Source: tdx-module td_call(), is_td_guest_in_64b_mode()."""
        guest = start(SHARED_BIT, TDCALL)
        guest.compatibility_mode()
        assert guest.exception() == (GP, 0)


class TestOperands:
    """Source: APM3; coconut-svsm kernel/src/sev/utils.rs pvalidate(), rmp_adjust()."""

    @pytest.mark.parametrize("offset", [0, 0x123, 0xFFF])
    @pytest.mark.parametrize("large", [False, True])
    @pytest.mark.parametrize("validate", [False, True])
    def test_pvalidate(self, start: Start, offset: int, large: bool, validate: bool) -> None:
        """The address is that of any byte of the page."""
        guest = start(C_BIT, PVALIDATE, rax=DATA + offset, rcx=int(large), rdx=int(validate))
        assert guest.run() == Pvalidate(DATA, large, validate)

    @pytest.mark.parametrize(
        ("rdx", "target", "permissions", "vmsa"),
        [
            (0x0000_0F01, 1, 0xF, False),  # all to VMPL1
            (0x0000_0002, 2, 0, False),  # nothing to VMPL2
            (0x0001_0101, 1, 1, True),  # a VMSA
            (0x0000_FFFF, 0xFF, 0xFF, False),  # what the CPU refuses with FAIL_INPUT
        ],
    )
    def test_rmpadjust(self, start: Start, rdx: int, target: int, permissions: int, vmsa: bool) -> None:
        guest = start(C_BIT, RMPADJUST, rax=DATA, rcx=1, rdx=rdx)
        assert guest.run() == Rmpadjust(DATA, True, target, permissions, vmsa)

    def test_vmgexit_shows_the_ghcb_msr(self, start: Start) -> None:
        """WRMSR, VMGEXIT, RDMSR, as a guest that has no GHCB page yet. Source: Linux sev_es_wr_ghcb_msr, VMGEXIT()."""
        guest = start(C_BIT, WRMSR + VMGEXIT + RDMSR, rcx=GHCB, rax=0x1234_5002, rdx=7)
        assert guest.run() == Vmgexit(7 << 32 | 0x1234_5002)
        guest.engine.complete(9 << 32 | 0x8000_0003)
        assert guest.run() == Halt()
        regs = guest.engine.get_regs()
        assert (regs.rax, regs.rdx) == (0x8000_0003, 9)
        assert guest.engine.get_msr(GHCB) == 9 << 32 | 0x8000_0003

    @pytest.mark.parametrize("index", [GHCB, SEV_STATUS])
    @pytest.mark.parametrize("code", [RDMSR, WRMSR])
    def test_others_have_no_such_msr(self, start: Start, index: int, code: bytes) -> None:
        assert start(SHARED_BIT, code, rcx=index).exception() == (GP, 0)

    def test_sev_status(self, start: Start) -> None:
        """SEV, SEV-ES and SEV-SNP are enabled; not to be written. Source: Linux msr-index.h MSR_AMD64_SEV."""
        guest = start(C_BIT, RDMSR, rcx=SEV_STATUS)
        assert guest.run() == Halt()
        assert guest.engine.get_regs().rax == 7
        assert start(C_BIT, WRMSR, rcx=SEV_STATUS).exception() == (GP, 0)


@pytest.mark.parametrize("code", [PVALIDATE, RMPADJUST], ids=["pvalidate", "rmpadjust"])
class TestTranslation:
    """The linear address goes through the guest's tables."""

    def test_a_page_that_is_not_there(self, start: Start, code: bytes) -> None:
        """#PF: APM3."""
        guest = start(C_BIT, code, rax=DATA + 5)
        guest.map(DATA, private=True, present=False)
        assert guest.exception() == (PF, 0)
        assert guest.engine.get_sregs().cr2 == DATA

    def test_a_page_that_is_mapped_as_shared(self, start: Start, code: bytes) -> None:
        """#PF with the reserved bit. Source: the oops in TUM-DSE/CVM_eval issue 37."""
        guest = start(C_BIT, code, rax=DATA)
        guest.map(DATA, private=False)
        assert guest.exception() == (PF, 9)
        assert guest.engine.get_sregs().cr2 == DATA

    def test_an_address_that_is_not_canonical(self, start: Start, code: bytes) -> None:
        assert start(C_BIT, code, rax=1 << 63).exception() == (GP, 0)

    def test_the_gpa_is_that_of_the_tables(self, start: Start, code: bytes) -> None:
        guest = start(C_BIT, code, rax=DATA)
        place = TABLES + 4 * PAGE + DATA // PAGE * 8
        guest.memory.set_word(place, guest.memory.word(place) + 7 * PAGE)
        stop = guest.run()
        assert isinstance(stop, (Pvalidate, Rmpadjust)) and stop.gpa == DATA + 7 * PAGE

    def test_the_page_itself_is_not_asked_of_stage_2(self, start: Start, code: bytes) -> None:
        """Whether it is mapped there is KVM's to see, with the RMP."""
        guest = start(C_BIT, code, rax=DATA)
        guest.memory.denied.add(DATA // PAGE)
        assert isinstance(guest.run(), (Pvalidate, Rmpadjust))

    def test_a_table_that_stage_2_does_not_hold(self, start: Start, code: bytes) -> None:
        """A walk that misses is repeated, with the instruction."""
        far = 2 << 20
        guest = start(C_BIT, code, rax=far)
        guest.map(far, private=True)
        table = (TABLES + 5 * PAGE) // PAGE
        guest.memory.denied.add(table)
        assert guest.run() == Stage2Miss(table * PAGE, private=True)
        assert guest.engine.get_regs().rip == CODE
        guest.memory.denied.clear()
        assert isinstance(guest.run(), (Pvalidate, Rmpadjust))
