"""Cpu: every register goes in and comes back, and the mode that follows is QEMU's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unicorn import x86_const

from guestmem.cpu.cpu_state import HF_GUEST, HF_IOBPT, RFLAGS_VM
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.uc_core import Core
from guestmem.cpu.x86_env import GENERAL

U64 = st.integers(0, (1 << 64) - 1)
LINEAR = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


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
    **{name: segments() for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")},
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
    **dict.fromkeys(GENERAL, U64),
    rip=U64,
    rflags=st.integers(0, (1 << 22) - 1).map(lambda value: value & ~0x28 | 2),
)


@LINEAR
@given(sregs=SREGS, regs=REGS)
def test_round_trip_through_the_cpu(core: Core, sregs: Sregs, regs: Regs) -> None:
    cpu = core.cpu
    cpu.set_sregs(sregs)
    cpu.set_regs(regs)
    cpu.save()
    cpu.set_sregs(Sregs())
    cpu.set_regs(Regs())
    cpu.restore()
    assert cpu.get_sregs() == dataclasses.replace(sregs, apic_base=Sregs().apic_base)
    assert cpu.get_regs() == regs


def test_unusable_is_not_present(core: Core) -> None:
    sregs = Sregs()
    sregs.ldt.present, sregs.ldt.unusable = 1, 1
    core.cpu.set_sregs(sregs)
    ldt = core.cpu.get_sregs().ldt
    assert (ldt.present, ldt.unusable) == (0, 1)


@pytest.mark.parametrize(
    ("cr0", "efer", "cs_l", "cs_db", "ss_dpl", "hflags"),
    [
        (0x10, 0, 0, 0, 0, "ADDSEG"),
        (0x11, 0, 0, 0, 0, "PE ADDSEG"),
        (0x11, 0, 0, 1, 3, "PE CS32 CPL3"),
        (0x80000011, 0x500, 1, 0, 0, "PE LMA CS64 CS32 SS32"),
        (0x80000011, 0x500, 0, 1, 3, "PE LMA CS32 CPL3"),
        (0x1F, 0, 0, 1, 0, "PE CS32 MP EM TS"),
    ],
)
def test_mode(core: Core, cr0: int, efer: int, cs_l: int, cs_db: int, ss_dpl: int, hflags: str) -> None:
    """Names and values as in QEMU's target/i386/cpu.h."""
    bits = {"CPL3": 3, "CS32": 1 << 4, "SS32": 1 << 5, "ADDSEG": 1 << 6, "PE": 1 << 7, "MP": 1 << 9, "EM": 1 << 10}
    bits |= {"TS": 1 << 11, "LMA": 1 << 14, "CS64": 1 << 15}
    sregs = Sregs(cr0=cr0, efer=efer)
    sregs.cs.base, sregs.cs.l, sregs.cs.db, sregs.ss.dpl = 0, cs_l, cs_db, ss_dpl
    core.cpu.set_sregs(sregs)
    core.cpu.set_regs(Regs())
    assert core.cpu.env.hflags & sum(bits.values()) == sum(bits[name] for name in hflags.split())


def test_the_public_interface_agrees(core: Core) -> None:
    core.cpu.set_regs(Regs(r15=0x1234, rip=0x5678))
    numbers = (x86_const.UC_X86_REG_R15, x86_const.UC_X86_REG_RIP)
    assert [core.read_register(number) for number in numbers] == [0x1234, 0x5678]
    core.write_register(x86_const.UC_X86_REG_CR2, 0x9ABC)
    assert core.cpu.get_sregs().cr2 == 0x9ABC


def test_what_is_ours_stays(core: Core) -> None:
    """The bits that make port and MSR exits exact are no state of the guest's."""
    core.cpu.set_sregs(Sregs())
    core.cpu.set_regs(Regs(rflags=RFLAGS_VM))
    assert core.cpu.env.hflags & (HF_IOBPT | HF_GUEST) == HF_IOBPT | HF_GUEST
