"""PVALIDATE and RMPADJUST by the RMP and what stage 2 maps, and what a VMSA page holds."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from guestmem.arch.architecture import UNDEFINED, Accept, Done, Faults, GuestInstruction, Outcome, Raises
from guestmem.arch.snp import vmsa
from guestmem.arch.snp.instructions import execute
from guestmem.arch.snp.rmp import ALL, Rmp, State, Status
from guestmem.cpu.engine import Pvalidate, Rmpadjust
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.memory import PAGE_SIZE, Pfn

ASID, GFN = 3, 0x40
PFN, LARGE = Pfn(5), Pfn(512)
CARRY = 1 << 32


def _rmp() -> Rmp:
    """A small page at GFN, a large one at frame 512, one of another guest."""
    rmp = Rmp(4096)
    assert rmp.rmpupdate(PFN, State(True, ASID, GFN)) is Status.SUCCESS
    assert rmp.rmpupdate(LARGE, State(True, ASID, 512, large=True)) is Status.SUCCESS
    assert rmp.rmpupdate(Pfn(6), State(True, ASID + 1, GFN + 1)) is Status.SUCCESS
    return rmp


def _pvalidate(gfn: int, large: bool = False, validate: bool = True) -> Pvalidate:
    return Pvalidate(gfn * PAGE_SIZE, large, validate)


def _rmpadjust(gfn: int, large: bool = False, target: int = 1, permissions: int = ALL, vmsa: bool = True) -> Rmpadjust:
    return Rmpadjust(gfn * PAGE_SIZE, large, target, permissions, vmsa)


ROWS: list[tuple[GuestInstruction, tuple[Pfn, int] | None, Outcome, str]] = [
    (_pvalidate(GFN), (PFN, 0), Done(0), "validated"),
    (_pvalidate(GFN, validate=False), (PFN, 0), Done(CARRY), "is not valid already"),
    (_pvalidate(GFN), None, Faults(), "stage 2 maps nothing"),
    (_pvalidate(GFN + 1), (Pfn(6), 0), Faults(), "another guest's"),
    (_pvalidate(GFN + 2), (Pfn(7), 0), Faults(), "the host's"),
    (_pvalidate(GFN, large=True), (PFN, 0), Done(Status.FAIL_SIZEMISMATCH), "2M over a leaf of 4K"),
    (_pvalidate(512, large=True), (LARGE, 9), Done(0), "2M"),
    (_pvalidate(513), (Pfn(LARGE + 1), 9), Faults(smaller=True), "4K in an entry of 2M"),
    (_rmpadjust(GFN), (PFN, 0), Raises(29, 0x404), "not validated: #VC"),
    (_rmpadjust(GFN), None, Faults(), "stage 2 maps nothing"),
    (_rmpadjust(GFN, target=0), (PFN, 0), Done(Status.FAIL_PERMISSION), "its own level"),
    (_rmpadjust(GFN, target=4), (PFN, 0), Done(Status.FAIL_INPUT), "no such level"),
    (Accept(GFN * PAGE_SIZE, False), (PFN, 0), UNDEFINED, "not SNP's"),
]


@pytest.mark.parametrize(("instruction", "leaf", "outcome", "why"), ROWS, ids=[why for *_, why in ROWS])
def test_outcome(instruction: GuestInstruction, leaf: tuple[Pfn, int] | None, outcome: Outcome, why: str) -> None:
    """Source: APM volume 3, PVALIDATE, RMPADJUST."""
    assert execute(_rmp(), ASID, instruction, leaf) == outcome


def test_a_page_becomes_a_vmsa_and_is_one_no_more() -> None:
    rmp = _rmp()
    execute(rmp, ASID, _pvalidate(GFN), (PFN, 0))
    assert execute(rmp, ASID, _rmpadjust(GFN), (PFN, 0)) == Done(0)
    assert rmp.vmrun(ASID, GFN, PFN) is None
    assert execute(rmp, ASID, _rmpadjust(GFN, vmsa=False), (PFN, 0)) == Done(Status.FAIL_INUSE)
    assert rmp.vmrun(ASID, GFN, PFN) is not None, "it is in use"
    rmp.vmexit(PFN)
    assert execute(rmp, ASID, _rmpadjust(GFN, vmsa=False), (PFN, 0)) == Done(0)
    assert rmp.vmrun(ASID, GFN, PFN) is not None


REGS = Regs(*[*range(1, 18), 0x202])
SREGS = Sregs(
    cs=Segment(0x1000, 0xFFFFFFFF, 0x10, 11, 1, 0, 0, 1, 1, 1, 0),
    ss=Segment(0, 0xFFFFFFFF, 0x18, 3, 1, 3, 1, 1, 0, 1, 1),
    tr=Segment(0x2000, 0x67, 0x28, 11, 1, 0, 0, 0, 0, 0, 0),
    gdt=DescriptorTable(0x3000, 0x3F),
    idt=DescriptorTable(0x4000, 0xFFF),
    cr0=0x80050033,
    cr2=0xDEAD000,
    cr3=0x5000,
    cr4=0x6F8,
    efer=0x1D01,
)


def test_registers_survive_a_vmsa() -> None:
    page = vmsa.save(bytes(PAGE_SIZE), REGS, SREGS)
    regs, sregs = vmsa.load(page)
    assert regs == REGS
    assert dataclasses.replace(sregs, cr8=SREGS.cr8, apic_base=SREGS.apic_base) == SREGS
    assert vmsa.save(page, regs, sregs) == page


def test_registers_are_at_the_manuals_places() -> None:
    """Source: APM volume 2, table B-4; struct sev_es_save_area."""
    page = vmsa.save(bytes(PAGE_SIZE), REGS, SREGS)
    for place, value in ((0x178, REGS.rip), (0x170, 0x202), (0x1D8, REGS.rsp), (0x1F8, REGS.rax), (0x308, REGS.rcx)):
        assert struct.unpack_from("<Q", page, place)[0] == value
    for place, value in ((0xD0, SREGS.efer), (0x148, SREGS.cr4), (0x150, SREGS.cr3), (0x158, SREGS.cr0)):
        assert struct.unpack_from("<Q", page, place)[0] == value
    assert struct.unpack_from("<HHIQ", page, 0x10) == (0x10, 0xA9B, 0xFFFFFFFF, 0x1000)
    assert page[0xCB] == 3


def test_what_else_is_in_the_page_stays() -> None:
    page = bytearray(PAGE_SIZE)
    page[0x3B0] = 1  # SEV_FEATURES
    assert vmsa.save(bytes(page), REGS, SREGS)[0x3B0] == 1
