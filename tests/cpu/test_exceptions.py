"""Delivery of exceptions, by guests that raise them. Frames are compared word by word."""

from __future__ import annotations

import pytest

from guestmem.cpu import boot
from guestmem.cpu.engine import Failed, Halt, Hypercall, PortOut, Shutdown, Stage2Miss, Stop
from guestmem.cpu.registers import DescriptorTable, Events, Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, SIZE, STACK, TABLES, Memory, assemble, run, start_long, start_real

HLT = b"\xf4"
IDT, GDT, TSS, HANDLER = 0x20000, 0x22000, 0x23000, 0x9000
KERNEL_STACK, IST_STACK = 0x60000, 0x70000
KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA = 0x08, 0x10, 0x2B, 0x33
ELSEWHERE = 0x7000_0000_0000
RF = 1 << 16


def gate64(handler: int, ist: int = 0, kind: int = 14, dpl: int = 0, present: int = 1) -> int:
    low = handler & 0xFFFF | KERNEL_CODE << 16 | ist << 32 | kind << 40 | dpl << 45 | present << 47
    return low | (handler >> 16 & 0xFFFF) << 48 | handler >> 32 << 64


def gate32(handler: int, kind: int = 14, dpl: int = 0, selector: int = KERNEL_CODE) -> int:
    return handler & 0xFFFF | selector << 16 | kind << 40 | dpl << 45 | 1 << 47 | handler >> 16 << 48


def start(
    engine: UnicornEngine, memory: Memory, code: bytes, gates: dict[int, int] | None = None, user: bool = False
) -> None:
    """64-bit code with an IDT of `gates` by vector, a TSS, and a handler that halts."""
    start_long(engine, memory, code)
    memory.write(HANDLER, HLT)
    for vector, gate in (gates or {}).items():
        memory.write(IDT + vector * 16, gate.to_bytes(16, "little"))
    descriptors = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF)
    memory.write(GDT, b"".join(entry.to_bytes(8, "little") for entry in descriptors))
    memory.set_word(TSS + 4, KERNEL_STACK)
    memory.set_word(TSS + 36, IST_STACK)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    sregs.idt, sregs.gdt = DescriptorTable(IDT, 0xFFF), DescriptorTable(GDT, 0x3F)
    sregs.tr = Segment(base=TSS, limit=0x67, selector=0x40, type=11, s=0)
    if user:
        sregs.cs.selector, sregs.cs.dpl = USER_CODE, 3
        sregs.ss.selector, sregs.ss.dpl = USER_DATA, 3
    regs.rdi = ELSEWHERE
    engine.set_sregs(sregs)
    engine.set_regs(regs)


def frame(memory: Memory, pointer: int, words: int) -> list[int]:
    return [memory.word(pointer + i * 8) for i in range(words)]


class TestLongMode:
    READ = b"\x48\x8b\x9f\x23\x01\x00\x00" + HLT  # mov rbx, [rdi + 0x123]

    def test_page_fault(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {14: gate64(HANDLER)})
        assert run(engine) == Halt()
        regs, sregs = engine.get_regs(), engine.get_sregs()
        assert (regs.rip, regs.rsp, regs.rflags) == (HANDLER + 1, STACK - 48, 2)
        assert sregs.cr2 == ELSEWHERE + 0x123
        assert frame(memory, regs.rsp, 6) == [0, CODE, KERNEL_CODE, 2 | RF, STACK, KERNEL_DATA]

    def test_write_fault_to_a_read_only_page(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, b"\x48\x89\x04\x25\x08\x50\x00\x00", {14: gate64(HANDLER)})  # mov [0x5008], rax
        leaf = TABLES + 4 * PAGE + DATA // PAGE * 8
        memory.set_word(leaf, memory.word(leaf) & ~2)
        sregs = engine.get_sregs()
        sregs.cr0 |= 1 << 16
        engine.set_sregs(sregs)
        assert run(engine) == Halt()
        assert memory.word(engine.get_regs().rsp) == 3
        assert engine.get_sregs().cr2 == 0x5008

    def test_address_that_is_not_canonical(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {13: gate64(HANDLER)})
        regs = engine.get_regs()
        regs.rdi = 1 << 63
        engine.set_regs(regs)
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 2) == [0, CODE]

    def test_handler_returns_and_the_instruction_repeats(self, engine: UnicornEngine, memory: Memory) -> None:
        """Two thousand faults: mov rdi, DATA in the handler; iretq."""
        code = assemble(
            """
            mov rcx, 2000
        again:
            mov rdi, 0x700000000000
            mov rbx, [rdi]
            dec rcx
            jnz again
            hlt
            """
        )
        start(engine, memory, code, {14: gate64(HANDLER)})
        memory.set_word(DATA, 0x77)
        memory.write(HANDLER, assemble("add rsp, 8\nmov rdi, 0x5000\ninc rax\niretq", address=HANDLER))
        assert run(engine) == Halt()
        regs = engine.get_regs()
        assert (regs.rax, regs.rbx, regs.rcx, regs.rsp) == (2000, 0x77, 0, STACK)

    def test_stack_is_aligned(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {14: gate64(HANDLER)})
        regs = engine.get_regs()
        regs.rsp = STACK - 3
        engine.set_regs(regs)
        assert run(engine) == Halt()
        assert engine.get_regs().rsp == STACK - 16 - 48
        assert frame(memory, engine.get_regs().rsp, 6)[4] == STACK - 3

    def test_stack_that_is_not_canonical(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, b"\xcd\x30", {48: gate64(HANDLER), 12: gate64(HANDLER, ist=1)})
        regs = engine.get_regs()
        regs.rsp = 1 << 62
        engine.set_regs(regs)
        assert run(engine) == Halt()
        assert engine.get_regs().rsp == IST_STACK - 48
        assert frame(memory, IST_STACK - 48, 2) == [0, CODE]

    def test_interrupt_stack_table(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {14: gate64(HANDLER, ist=1)})
        assert run(engine) == Halt()
        assert engine.get_regs().rsp == IST_STACK - 48
        assert engine.get_sregs().ss.selector == KERNEL_DATA

    def test_trap_gate_keeps_if(self, engine: UnicornEngine, memory: Memory) -> None:
        for kind, rflags in ((14, 2), (15, 0x202)):
            start(engine, memory, b"\xcd\x30", {48: gate64(HANDLER, kind=kind)})
            regs = engine.get_regs()
            regs.rflags = 0x302  # IF and TF
            engine.set_regs(regs)
            assert run(engine) == Halt()
            regs = engine.get_regs()
            assert regs.rflags == rflags
            assert frame(memory, regs.rsp, 3) == [CODE + 2, KERNEL_CODE, 0x302]

    def test_from_ring_3(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {14: gate64(HANDLER)}, user=True)
        assert run(engine) == Halt()
        regs, sregs = engine.get_regs(), engine.get_sregs()
        assert regs.rsp == KERNEL_STACK - 48
        assert frame(memory, regs.rsp, 6) == [4, CODE, USER_CODE, 2 | RF, STACK, USER_DATA]
        assert (sregs.cs.selector, sregs.cs.dpl, sregs.ss.selector, sregs.ss.dpl) == (KERNEL_CODE, 0, 0, 0)
        assert sregs.ss.unusable == 1

    def test_int_from_ring_3_needs_a_gate_of_ring_3(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, b"\xcd\x80", {128: gate64(HANDLER, dpl=3), 13: gate64(HANDLER)}, user=True)
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 2) == [CODE + 2, USER_CODE]
        start(engine, memory, b"\xcd\x81", {129: gate64(HANDLER), 13: gate64(HANDLER)}, user=True)
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 2) == [129 * 8 + 2, CODE]

    def test_port_from_ring_3(self, engine: UnicornEngine, memory: Memory) -> None:
        """By IOPL, by the bitmap of the TSS, or #GP."""
        start(engine, memory, b"\xe6\x80", {13: gate64(HANDLER)}, user=True)
        memory.set_word(TSS + 102, 0x68, 2)
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 3) == [0, CODE, USER_CODE]
        start(engine, memory, b"\xe6\x80", user=True)
        sregs = engine.get_sregs()
        sregs.tr.limit = 0x200
        engine.set_sregs(sregs)
        memory.set_word(TSS + 102, 104, 2)
        assert run(engine) == PortOut(0x80, 1, 0)
        assert engine.get_regs().rip == CODE + 2
        start(engine, memory, b"\xe6\x80", user=True)
        regs = engine.get_regs()
        regs.rflags = 0x3002
        engine.set_regs(regs)
        assert run(engine) == PortOut(0x80, 1, 0)

    @pytest.mark.parametrize(
        ("code", "vector", "error_code"),
        [
            (b"\x31\xc9\xf7\xf1", 0, None),  # xor ecx, ecx; div ecx
            (b"\x90\x0f\x0b", 6, None),  # nop; ud2
            (b"\x90\x8e\xd8", 13, 0x78),  # nop; mov ds, ax, beyond the GDT
        ],
    )
    def test_faults_of_instructions(
        self, engine: UnicornEngine, memory: Memory, code: bytes, vector: int, error_code: int | None
    ) -> None:
        start(engine, memory, code, {vector: gate64(HANDLER)})
        regs = engine.get_regs()
        regs.rax = 0x78
        engine.set_regs(regs)
        for _ in range(3):
            # Three times: QEMU would take the second for a double fault.
            regs = engine.get_regs()
            regs.rip, regs.rsp = CODE, STACK
            engine.set_regs(regs)
            assert run(engine) == Halt()
            words = frame(memory, engine.get_regs().rsp, 2)
            at = CODE + len(code) - 2
            assert words == ([at, KERNEL_CODE] if error_code is None else [error_code, at])

    def test_single_step_of_the_guest(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, b"\x90\x90", {1: gate64(HANDLER)})
        regs = engine.get_regs()
        regs.rflags |= 0x100
        engine.set_regs(regs)
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 3) == [CODE + 1, KERNEL_CODE, 0x102]

    @pytest.mark.parametrize(
        ("code", "stop"),
        [
            (b"\xe6\x80\x90", PortOut(0x80, 1, 0)),
            (b"\x0f\x01\xd9\x90", Hypercall(0, (0, 0, 0, DATA))),
            (b"\x6e\x90", PortOut(0, 1, 0)),
        ],
    )
    def test_single_step_over_an_exit(self, engine: UnicornEngine, memory: Memory, code: bytes, stop: Stop) -> None:
        """The trap follows the exit, the instruction and DR6.BS are complete."""
        handler = b"\x0f\x21\xf0" + HLT  # mov rax, dr6
        for _ in range(2):
            start(engine, memory, code, {1: gate64(HANDLER)})
            memory.write(HANDLER, handler)
            regs = engine.get_regs()
            regs.rflags, regs.rsi = 0x102, DATA
            engine.set_regs(regs)
            assert run(engine) == stop
            assert run(engine) == Halt()
            regs = engine.get_regs()
            assert frame(memory, regs.rsp, 3) == [CODE + len(code) - 1, KERNEL_CODE, 0x102]
            assert regs.rax & 1 << 14

    def test_double_fault(self, engine: UnicornEngine, memory: Memory) -> None:
        """A page fault whose gate is not present."""
        start(engine, memory, self.READ, {14: gate64(HANDLER, present=0), 8: gate64(HANDLER)})
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 2) == [0, CODE]
        assert engine.get_sregs().cr2 == ELSEWHERE + 0x123

    def test_benign_then_contributory_is_no_double_fault(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, b"\x0f\x0b", {6: gate64(HANDLER, present=0), 11: gate64(HANDLER)})
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 2) == [6 * 8 + 3, CODE]

    def test_triple_fault(self, engine: UnicornEngine, memory: Memory) -> None:
        start(engine, memory, self.READ, {14: gate64(HANDLER)})
        regs = engine.get_regs()
        regs.rsp = ELSEWHERE
        engine.set_regs(regs)
        assert run(engine) == Shutdown()
        assert (engine.get_regs().rip, engine.get_regs().rsp) == (CODE, ELSEWHERE)
        assert run(engine) == Shutdown()

    @pytest.mark.parametrize(("page", "write"), [(IDT, False), (GDT, False), (STACK - PAGE, True)])
    def test_stage_2_interrupts_a_delivery(self, engine: UnicornEngine, memory: Memory, page: int, write: bool) -> None:
        start(engine, memory, b"\xcd\x30" + HLT, {48: gate64(HANDLER)})  # int 0x30
        memory.denied.add(page // PAGE)
        stop = run(engine)
        assert isinstance(stop, Stage2Miss)
        assert (stop.gpa // PAGE, stop.write, stop.fetch) == (page // PAGE, write, False)
        assert run(engine) == stop
        memory.denied.clear()
        assert run(engine) == Halt()
        assert frame(memory, engine.get_regs().rsp, 5) == [CODE + 2, KERNEL_CODE, 2, STACK, KERNEL_DATA]


class TestProtectedMode:
    TSS_STACK = 0x61000

    def start(self, engine: UnicornEngine, memory: Memory, code: bytes, ring: int, gate: int) -> None:
        memory.write(CODE, code)
        memory.write(HANDLER, HLT)
        memory.write(IDT + 0x30 * 8, gate.to_bytes(8, "little"))
        memory.write(IDT + 13 * 8, gate32(HANDLER).to_bytes(8, "little"))
        descriptors = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF)
        memory.write(GDT, b"".join(entry.to_bytes(8, "little") for entry in descriptors))
        memory.set_word(TSS + 4, self.TSS_STACK, 4)
        memory.set_word(TSS + 8, KERNEL_DATA, 4)
        sregs = Sregs(cr0=0x11, gdt=DescriptorTable(GDT, 0x3F), idt=DescriptorTable(IDT, 0x7FF))
        code_selector, data_selector = (USER_CODE, USER_DATA) if ring else (KERNEL_CODE, KERNEL_DATA)
        sregs.cs = Segment(0, 0xFFFFFFFF, code_selector, type=11, dpl=ring, db=1, g=1)
        sregs.ss = sregs.ds = sregs.es = Segment(0, 0xFFFFFFFF, data_selector, type=3, dpl=ring, db=1, g=1)
        sregs.tr = Segment(base=TSS, limit=0x67, selector=0x40, type=11, s=0)
        engine.set_sregs(sregs)
        engine.set_regs(Regs(rip=CODE, rsp=STACK, rflags=0x202))

    def test_same_ring(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\xcd\x30", 0, gate32(HANDLER))
        assert run(engine) == Halt()
        regs = engine.get_regs()
        assert (regs.rip, regs.rsp, regs.rflags) == (HANDLER + 1, STACK - 12, 2)
        assert [memory.word(regs.rsp + i * 4, 4) for i in range(3)] == [CODE + 2, KERNEL_CODE, 0x202]

    def test_inner_ring(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\xcd\x30", 3, gate32(HANDLER, dpl=3))
        assert run(engine) == Halt()
        regs, sregs = engine.get_regs(), engine.get_sregs()
        assert regs.rsp == self.TSS_STACK - 20
        words = [memory.word(regs.rsp + i * 4, 4) for i in range(5)]
        assert words == [CODE + 2, USER_CODE, 0x202, STACK, USER_DATA]
        assert (sregs.ss.selector, sregs.ss.dpl, sregs.ss.limit, sregs.cs.selector) == (
            KERNEL_DATA,
            0,
            0xFFFFFFFF,
            KERNEL_CODE,
        )

    def test_16_bit_gate(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\xcd\x30", 0, gate32(HANDLER, kind=7))
        assert run(engine) == Halt()
        regs = engine.get_regs()
        assert (regs.rsp, regs.rflags) == (STACK - 6, 0x202)
        assert [memory.word(regs.rsp + i * 2, 2) for i in range(3)] == [CODE + 2, KERNEL_CODE, 0x202]

    def test_gate_to_data(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\xcd\x30", 0, gate32(HANDLER, selector=KERNEL_DATA))
        assert run(engine) == Halt()
        assert memory.word(engine.get_regs().rsp, 4) == KERNEL_DATA

    def test_task_gate_is_refused(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\xcd\x30", 0, gate32(HANDLER, kind=5))
        assert run(engine) == Failed(CODE + 2, "vector 48 through a task gate")


class TestRealMode:
    def test_interrupt_and_return(self, engine: UnicornEngine, memory: Memory) -> None:
        start_real(engine, memory, b"\xcd\x21\xf4")
        memory.set_word(0x21 * 4, 0x0100 << 16 | 0x20, 4)
        memory.write(0x1020, b"\xe6\x80\xcf")  # out 0x80, al; iret
        regs = engine.get_regs()
        regs.rflags = 0x202
        engine.set_regs(regs)
        assert run(engine) == PortOut(0x80, 1, 0)
        regs, sregs = engine.get_regs(), engine.get_sregs()
        assert (regs.rip, regs.rsp, regs.rflags) == (0x22, STACK - 6, 2)
        assert (sregs.cs.selector, sregs.cs.base) == (0x100, 0x1000)
        assert [memory.word(STACK - 6 + i * 2, 2) for i in range(3)] == [CODE + 2, 0, 0x202]
        assert run(engine) == Halt()
        assert (engine.get_regs().rip, engine.get_regs().rsp, engine.get_regs().rflags) == (CODE + 3, STACK, 0x202)

    def test_short_vector_table_is_a_triple_fault(self, engine: UnicornEngine, memory: Memory) -> None:
        start_real(engine, memory, b"\xcd\x21")
        sregs = engine.get_sregs()
        sregs.idt.limit = 3
        engine.set_sregs(sregs)
        assert run(engine) == Shutdown()


def test_virtual_8086_mode_is_refused(engine: UnicornEngine, memory: Memory) -> None:
    start(engine, memory, b"\x0f\x0b")
    sregs = engine.get_sregs()
    sregs.efer, sregs.cr0 = 0, 0x11
    sregs.cs.l, sregs.cs.base = 0, 0
    sregs.ss.dpl = 3
    engine.set_sregs(sregs)
    regs = engine.get_regs()
    regs.rflags |= 1 << 17
    engine.set_regs(regs)
    assert run(engine) == Failed(CODE, "vector 6 in virtual-8086 mode")


def test_deliver_changes_nothing_before_it_is_done(engine: UnicornEngine, memory: Memory) -> None:
    """A stack that is not there: no register but CR2 differs after a triple fault."""
    regs, sregs = boot.long_mode(CODE, ELSEWHERE, TABLES, SIZE, memory.write)
    memory.write(IDT + 14 * 16, gate64(HANDLER).to_bytes(16, "little"))
    sregs.idt = DescriptorTable(IDT, 0xFFF)
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    engine.set_events(
        Events(exception_injected=True, exception_nr=14, exception_error_code=2, exception_payload=0x1234)
    )
    assert run(engine) == Shutdown()
    sregs.cr2 = ELSEWHERE - 8
    assert (engine.get_regs(), engine.get_sregs()) == (regs, sregs)


def test_hidden_part_of_the_handlers_segment(engine: UnicornEngine, memory: Memory) -> None:
    """Every field of a descriptor, as the delivery reads it."""
    start(engine, memory, b"\x0f\x0b", {6: gate64(HANDLER)})
    memory.set_word(GDT + KERNEL_CODE, 0x00BF_9B00_0000_789A)
    assert run(engine) == Halt()
    assert engine.get_sregs().cs == Segment(
        base=0, limit=0xF789_AFFF, selector=8, type=11, present=1, dpl=0, db=0, s=1, l=1, g=1, avl=1
    )
