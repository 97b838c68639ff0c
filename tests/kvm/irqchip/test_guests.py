"""Guests in machine code program every controller, and are interrupted by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from guestmem.kvm.exits import Exit, InterruptedExit, IoapicEoiExit
from guestmem.kvm.irqchip import USERSPACE_SOURCE, MsiRoute
from guestmem.kvm.irqchip.routing import parse_routes
from guestmem.uapi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE
from tests.kvm.irqchip.machine import AP_CODE, DATA, FINISH, MS, XAPIC_ON, Machine

New = Callable[..., Machine]
WAIT = "sti\n hlt\n cli\n"


@pytest.fixture
def new() -> Iterator[New]:
    made: list[Machine] = []

    def new_machine(**options: object) -> Machine:
        made.append(Machine(**options))  # type: ignore[arg-type]
        return made[-1]

    yield new_machine
    for machine in made:
        machine.close()


def lapic_timer(divide: int, lvt: int, count: int) -> str:
    return f"""
        mov dword ptr [rbx + 0x3e0], {divide}
        mov dword ptr [rbx + 0x320], {lvt}
        mov dword ptr [rbx + 0x380], {count}
    """


def test_the_lapic_timer_once(new: New) -> None:
    machine = new()
    machine.start(XAPIC_ON + lapic_timer(divide=0xB, lvt=0x31, count=5_000_000) + WAIT + FINISH)
    before = machine.clock.time
    machine.run()
    assert machine.said[0] == [0x31]
    assert machine.clock.time == before + 5 * MS
    lapic = machine.vcpus[0].vcpu.lapic
    assert lapic is not None and (lapic.irr, lapic.isr, lapic.timer.current_count) == (0, 0, 0)


def test_the_lapic_timer_again_and_again(new: New) -> None:
    """Divided by 2: the count is of 2 ns."""
    machine = new()
    machine.start(XAPIC_ON + lapic_timer(divide=0, lvt=0x2_0031, count=500_000) + WAIT * 4 + FINISH)
    before = machine.clock.time
    machine.run()
    assert machine.said[0] == [0x31] * 4
    assert machine.clock.time == before + 4 * MS


def test_the_lapic_timer_at_a_tsc_deadline_by_x2apic_msrs(new: New) -> None:
    machine = new(eoi="x2apic")
    machine.start(
        """
        mov ecx, 0x1b
        rdmsr
        or eax, 0xc00
        wrmsr
        mov ecx, 0x80f
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ecx, 0x832
        mov eax, 0x40033
        wrmsr
        rdtsc
        add eax, 2000000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
        """
        + WAIT
        + """
        mov ecx, 0x6e0
        rdmsr
        out 0x10, al
        """
        + FINISH
    )
    before = machine.clock.time
    machine.run()
    assert machine.said[0] == [0x33, 0], "and it reads 0 once it has fired"
    assert machine.clock.time - before > 1000 * MS


def test_an_x2apic_register_that_is_not_there_is_gp(new: New) -> None:
    machine = new(eoi="x2apic")
    machine.start("mov ecx, 0x80f\n rdmsr\n" + FINISH)  # still in xAPIC mode
    machine.memory.write(0x20000 + 64 * 13, bytes.fromhex("b00d e610 e6f4"))  # mov al, 13; out; out
    machine.run()
    assert machine.said[0] == [13]


def test_ipis_to_oneself_by_priority(new: New) -> None:
    """Two vectors sent with interrupts off: the higher first. Then one whose class the TPR keeps off."""
    machine = new()
    machine.start(
        XAPIC_ON
        + """
        mov dword ptr [rbx + 0x300], 0x40041
        mov dword ptr [rbx + 0x300], 0x40052
        sti
        nop
        cli
        mov dword ptr [rbx + 0x80], 0x60
        mov dword ptr [rbx + 0x300], 0x40061
        sti
        nop
        mov al, 1
        out 0x10, al
        mov rax, 2
        mov cr8, rax
        mov ecx, 50000000
again:
        cmp byte ptr [0xb000], 0
        jne done
        dec ecx
        jnz again
done:
        """
        + FINISH
    )
    machine.run()
    assert machine.said[0] == [0x52, 0x41, 1, 0x61]


def test_an_nmi_ipi(new: New) -> None:
    machine = new()
    machine.start(XAPIC_ON + "mov dword ptr [rbx + 0x300], 0x40400\n nop\n" + FINISH)
    machine.run()
    assert machine.said[0] == [2]


def test_init_and_sipi_start_the_other_processor(new: New) -> None:
    machine = new(vcpus=2)
    machine.start_ap("mov al, 0x77\n out 0x10, al\n mov byte ptr [0xb000], 1\n cli\n hlt")
    machine.start(
        XAPIC_ON
        + f"""
        mov dword ptr [rbx + 0x310], 0x01000000
        mov dword ptr [rbx + 0x300], 0x4500
        mov dword ptr [rbx + 0x300], {0x4600 | AP_CODE >> 12}
        mov dword ptr [rbx + 0x300], {0x4600 | AP_CODE >> 12}
wait:
        pause
        cmp byte ptr [{DATA}], 0
        je wait
        """
        + FINISH
    )
    machine.run()
    assert machine.said == {0: [], 1: [0x77]}
    assert machine.vcpus[1].engine.get_sregs().cs.selector == AP_CODE >> 4


def test_four_processors_answer_all_but_self(new: New) -> None:
    """Each AP enables its APIC in 16-bit code with 32-bit addresses, then takes vector 0x40, which is at 0x100."""
    machine = new(vcpus=4)
    machine.memory.write(0x100, (AP_CODE + 0x200).to_bytes(4, "little"))
    machine.start_ap(
        f"""
        cli
        lgdt cs:[0x100]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov dx, 8
        mov ds, dx
        and al, 0xfe
        mov cr0, eax
        mov ebx, 0xfee000f0
        mov dword ptr [ebx], 0x1ff
        lock inc byte ptr [{DATA}]
        sti
again:  hlt
        jmp again
        .org 0x100
        .word 15
        .long {AP_CODE} + 0x110
        .org 0x118
        .quad 0x00cf93000000ffff
        .org 0x200
        lock inc byte ptr [{DATA + 1}]
        iret
        """
    )
    machine.start(
        XAPIC_ON
        + f"""
        mov dword ptr [rbx + 0x300], 0xc4500
        mov dword ptr [rbx + 0x300], {0xC4600 | AP_CODE >> 12}
up:     pause
        cmp byte ptr [{DATA}], 3
        jne up
        mov dword ptr [rbx + 0x300], 0xc4040
wait:   pause
        cmp byte ptr [{DATA + 1}], 3
        jne wait
        """
        + FINISH
    )
    machine.run()
    assert machine.word(DATA, 2) == 0x303


PIC_ON = """
        mov al, 0x11
        out 0x20, al
        out 0xa0, al
        mov al, 0x20
        out 0x21, al
        mov al, 0x28
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 1
        out 0x21, al
        out 0xa1, al
        xor al, al
        out 0x21, al
        out 0xa1, al
"""


def test_the_pit_ticks_through_the_pic(new: New) -> None:
    """1193 of 1,193,182 Hz: 999.8 us each."""
    machine = new(pit=True, eoi="pic")
    machine.start(
        PIC_ON
        + """
        mov al, 0x34
        out 0x43, al
        mov al, 0xa9
        out 0x40, al
        mov al, 4
        out 0x40, al
        """
        + WAIT * 10
        + FINISH
    )
    before = machine.clock.time
    machine.run()
    assert machine.said[0] == [0x20] * 10
    assert abs(machine.clock.time - before - 10 * 1193 * 1e9 / 1_193_182) < 10


def test_a_line_of_the_second_pic(new: New) -> None:
    machine = new(eoi="pic")
    machine.start(PIC_ON + "mov al, 1\n out 0x10, al\n" + WAIT + FINISH)
    vcpu = machine.vcpus[0]
    vcpu.run()
    machine.irqchip.pulse(10, USERSPACE_SOURCE)
    machine.run()
    assert machine.said[0] == [0x2A]


IOAPIC_PIN_4 = """
        mov edx, 0xfec00000
        mov dword ptr [rdx], 0x19
        mov dword ptr [rdx + 0x10], 0
        mov dword ptr [rdx], 0x18
        mov dword ptr [rdx + 0x10], {}
        out 0x10, al
"""


def test_an_edge_at_the_ioapic(new: New) -> None:
    machine = new()
    machine.start(XAPIC_ON + IOAPIC_PIN_4.format(0x44) + WAIT + FINISH)
    machine.vcpus[0].run()
    assert machine.irqchip.pulse(4, USERSPACE_SOURCE) == 2, "the PIC's line 4 is not masked either"
    machine.run()
    assert machine.said[0] == [0x44]


def test_an_interrupt_that_comes_with_hlt_ends_it(new: New) -> None:
    """The slice of a call that is done at once meets HLT; the interrupt that was pending must not be taken first, and
    then slept upon."""
    machine = new()
    machine.start(XAPIC_ON + IOAPIC_PIN_4.format(0x44) + WAIT + FINISH)
    machine.vcpus[0].run()
    machine.irqchip.pulse(4, USERSPACE_SOURCE)
    assert machine.vcpus[0].vcpu.run_at_once() is None
    machine.run()
    assert machine.said[0] == [0x44]


def test_a_signal_leaves_a_halted_processor_halted(new: New) -> None:
    machine = new()
    machine.start(XAPIC_ON + IOAPIC_PIN_4.format(0x44) + WAIT + FINISH)
    vcpu = machine.vcpus[0].vcpu
    machine.vcpus[0].run()
    scheduler = machine.host.scheduler

    async def interrupted() -> Exit:
        task = scheduler.spawn(vcpu.run(), "vcpu")
        for _ in range(20):
            await scheduler.cond_resched("let it sleep")
        task.signal_pending = True
        return await scheduler.join(task)

    assert machine.host.run(interrupted()) == InterruptedExit(by_signal=True)
    assert vcpu.mp_state == KVM_MP_STATE_HALTED
    machine.irqchip.pulse(4, USERSPACE_SOURCE)
    machine.run()
    assert machine.said[0] == [0x44] and vcpu.mp_state == KVM_MP_STATE_RUNNABLE


def test_a_kick_reaches_who_runs_the_engine(new: New) -> None:
    machine = new()
    kicked: list[int] = []
    machine.vcpus[0].vcpu.interrupts.on_kick = lambda: kicked.append(1)
    lapic = machine.vcpus[0].vcpu.lapic
    assert lapic is not None
    lapic.write(0xF, 0x1FF)
    machine.irqchip.send_msi(MsiRoute(0xFEE0_0000, 0, 0x50))
    machine.vcpus[0].vcpu.interrupts.inject_nmi()
    assert len(kicked) == 2


def test_a_level_at_the_ioapic_comes_again_until_it_is_down(new: New) -> None:
    machine = new()
    machine.start(XAPIC_ON + IOAPIC_PIN_4.format(0x8044) + "sti\n hlt\n nop\n cli\n" + FINISH)
    machine.vcpus[0].run()
    ioapic = machine.irqchip.ioapic
    assert ioapic is not None
    assert machine.irqchip.set_irq(4, USERSPACE_SOURCE, True) == 2
    assert ioapic.entries[4] >> 14 & 1, "remote IRR"
    acks: list[int] = []

    def acked() -> None:
        acks.append(1)
        if len(acks) == 3:
            machine.irqchip.set_irq(4, USERSPACE_SOURCE, False)

    machine.irqchip.add_ack_listener(4, acked)
    machine.run()
    assert machine.said[0] == [0x44] * 3
    assert not ioapic.entries[4] >> 14 & 1


def test_an_msi_and_the_eoi_exit_of_a_split_irqchip(new: New) -> None:
    machine = new(split_pins=24)
    entry = [5, 2, 0, 0, 0xFEE0_0000, 0, 0x8055, 0, 0, 0, 0, 0]
    machine.irqchip.set_routes(parse_routes(b"".join(word.to_bytes(4, "little") for word in entry), True, False))
    machine.start(XAPIC_ON + "out 0x10, al\n" + WAIT + "out 0x10, al\n" + WAIT + FINISH)
    handle = machine.vcpus[0]
    handle.run()
    assert machine.irqchip.set_irq(5, USERSPACE_SOURCE, True) == 1
    exits = [handle.run() for _ in range(3)]
    assert exits[1] == IoapicEoiExit(0x55)
    assert machine.irqchip.send_msi(MsiRoute(0xFEE0_0000, 0, 0x66)) == 1, "an edge: no exit"
    assert machine.run() == []
    assert machine.said[0] == [0x66]


def test_channel_2_is_seen_at_port_0x61(new: New) -> None:
    """Mode 0, 0x1000 ticks, 3.4 ms: how Linux times its TSC."""
    machine = new(pit=True)
    machine.start(
        """
        mov al, 0xb0
        out 0x43, al
        xor al, al
        out 0x42, al
        mov al, 0x10
        out 0x42, al
        mov al, 1
        out 0x61, al
        in al, 0x61
        and al, 0x21
        out 0x10, al
        in al, 0x61
        and al, 0x21
        out 0x10, al
        """
        + FINISH
    )
    handle = machine.vcpus[0]
    first = handle.run()
    machine.clock.time += 4 * MS
    machine.run()
    assert first.data == 1 and machine.said[0] == [0x21]  # type: ignore[union-attr]


def test_kvmclock(new: New) -> None:
    machine = new()
    machine.start(
        f"""
        mov ecx, 0x4b564d01
        mov eax, {DATA + 1}
        xor edx, edx
        wrmsr
        mov ecx, 0x4b564d00
        mov eax, {DATA + 64}
        wrmsr
        nop
        """
        + FINISH
    )
    machine.clock.time += 7 * MS
    machine.run()
    version, _ = machine.word(DATA), machine.word(DATA + 4)
    assert version == 2
    assert machine.word(DATA + 16, 8) == 7 * MS
    assert (machine.word(DATA + 24), machine.word(DATA + 28, 1), machine.word(DATA + 29, 1)) == (1 << 31, 1, 1)
    assert machine.word(DATA + 64) == 2
    assert machine.word(DATA + 68) > 1_700_000_000
