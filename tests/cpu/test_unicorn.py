"""UnicornEngine: the protocol, stop by stop. Ports, MMIO and exceptions have files of their own."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from guestmem.cpu.engine import (
    Engine,
    Failed,
    Halt,
    HostWindow,
    PortOut,
    Shutdown,
    SliceOver,
    Stage2Miss,
    Translation,
)
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, STACK, TABLES, Memory, assemble, run, start_long, start_real

HLT = b"\xf4"


def test_implements_the_protocol(engine: UnicornEngine) -> None:
    as_protocol: Engine = engine
    assert as_protocol.get_sregs() == Sregs()
    assert as_protocol.get_regs() == Regs(rip=0xFFF0, rdx=0x600)


def test_halt_is_past_the_instruction(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, HLT + b"\x40" + HLT)
    assert run(engine) == Halt()
    assert engine.get_regs() == Regs(rip=CODE + 1, rsp=STACK)
    assert run(engine) == Halt()
    assert (engine.get_regs().rip, engine.get_regs().rax) == (CODE + 3, 1)


def test_code_at_address_zero(engine: UnicornEngine, memory: Memory) -> None:
    start_real(engine, memory, b"\x40" + HLT, address=0)
    assert run(engine) == Halt()
    assert (engine.get_regs().rip, engine.get_regs().rax) == (2, 1)


def test_reset_vector(engine: UnicornEngine, memory: Memory) -> None:
    """The first fetch after reset is at 4 GiB - 16."""
    assert run(engine) == Stage2Miss(0xFFFFFFF0, fetch=True)
    assert engine.get_regs().rip == 0xFFF0


class TestStage2:
    CODE_BYTES = b"\x48\xc7\x07\x42\x00\x00\x00\xe6\x80" + HLT  # mov qword [rdi], 0x42; out 0x80, al; hlt

    def start(self, engine: UnicornEngine, memory: Memory, address: int) -> None:
        start_long(engine, memory, self.CODE_BYTES)
        regs = engine.get_regs()
        regs.rdi = address
        engine.set_regs(regs)

    def test_miss_is_exact_and_repeats(self, engine: UnicornEngine, memory: Memory) -> None:
        memory.denied.add(0x6)
        self.start(engine, memory, 0x6123)
        before = engine.get_regs()
        for _ in range(3):
            assert run(engine) == Stage2Miss(0x6123, write=True)
            assert engine.get_regs() == before
        memory.denied.clear()
        assert run(engine) == PortOut(0x80, 1, 0)
        assert memory.word(0x6123) == 0x42

    def test_page_table_page(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, DATA)
        memory.denied.add(TABLES // PAGE + 2)
        assert run(engine) == Stage2Miss(TABLES + 2 * PAGE)
        memory.denied.clear()
        memory.read_only.add(TABLES // PAGE + 2)
        assert run(engine) == Stage2Miss(TABLES + 2 * PAGE, write=True)
        memory.read_only.clear()
        assert run(engine) == PortOut(0x80, 1, 0)

    def test_read_only_page(self, engine: UnicornEngine, memory: Memory) -> None:
        memory.read_only.add(DATA // PAGE)
        memory.set_word(DATA, 7)
        start_long(engine, memory, b"\x48\x8b\x07\x48\x89\x07" + HLT)  # mov rax, [rdi]; mov [rdi], rax
        regs = engine.get_regs()
        regs.rdi = DATA
        engine.set_regs(regs)
        assert run(engine) == Stage2Miss(DATA, write=True)
        assert (engine.get_regs().rax, engine.get_regs().rip) == (7, CODE + 3)

    def test_fetch(self, engine: UnicornEngine, memory: Memory) -> None:
        memory.denied.add(CODE // PAGE)
        self.start(engine, memory, DATA)
        assert run(engine) == Stage2Miss(CODE, fetch=True)

    def test_translations_are_kept_until_flush(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, DATA)
        assert run(engine) == PortOut(0x80, 1, 0)
        memory.denied.add(DATA // PAGE)
        restart(engine)
        assert run(engine) == PortOut(0x80, 1, 0)
        engine.flush_tlb()
        restart(engine)
        assert run(engine) == Stage2Miss(DATA, write=True)

    def test_fetch_ahead_is_not_a_miss(self, engine: UnicornEngine, memory: Memory) -> None:
        """Code that ends at the end of a page stops there, whether or not the next page exists."""
        start = 2 * PAGE - 3
        start_long(engine, memory, b"\x40\x90" + HLT, start)
        memory.denied.add(2)
        assert run(engine) == Halt()
        assert engine.get_regs().rip == 2 * PAGE
        assert run(engine) == Stage2Miss(2 * PAGE, fetch=True)

    def test_instruction_across_pages(self, engine: UnicornEngine, memory: Memory) -> None:
        start = 2 * PAGE - 3
        start_long(engine, memory, b"\x90\xb8\x78\x56\x34\x12" + HLT, start)  # nop; mov eax, 0x12345678
        memory.denied.add(2)
        assert run(engine) == Stage2Miss(2 * PAGE, fetch=True)
        assert engine.get_regs().rip == start + 1
        memory.denied.clear()
        assert run(engine) == Halt()
        assert engine.get_regs().rax == 0x12345678

    def test_flush_from_inside_of_translate(self, memory: Memory) -> None:
        class Flushing(Memory):
            def translate(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
                if gpa == DATA:
                    engine.flush_tlb()
                return super().translate(gpa, write, private)

        flushing = Flushing()
        engine = UnicornEngine(flushing)
        try:
            self.start(engine, flushing, DATA)
            assert run(engine) == PortOut(0x80, 1, 0)
            assert flushing.word(DATA) == 0x42
        finally:
            engine.close()
            flushing.close()

    def test_what_translate_raises_comes_out_of_run(self, engine: UnicornEngine, memory: Memory) -> None:
        def translate(gpa: int, write: bool, private: bool | None) -> Translation | None:
            raise LookupError(hex(gpa))

        start_real(engine, memory, HLT)
        memory.translate = translate  # type: ignore[method-assign]
        with pytest.raises(LookupError, match="0x1000"):
            run(engine)
        del memory.translate
        assert run(engine) == Halt()

    def test_windows_that_overlap(self, engine: UnicornEngine, memory: Memory) -> None:
        """Each page may come in a window of its own shape over the same memory."""
        base = memory.window.base

        def translate(gpa: int, write: bool, private: bool | None) -> Translation | None:
            size = PAGE * (1 + gpa // PAGE % 3)
            return Translation(base + gpa, True, HostWindow(base + gpa, size))

        memory.translate = translate  # type: ignore[method-assign]
        self.start(engine, memory, DATA)
        assert run(engine) == PortOut(0x80, 1, 0)
        assert memory.word(DATA) == 0x42


def restart(engine: UnicornEngine) -> None:
    regs = engine.get_regs()
    regs.rip = CODE
    engine.set_regs(regs)


class TestCodeChanges:
    """mov al, IMM; out 0x80, al; hlt"""

    def run_once(self, engine: UnicornEngine) -> int:
        restart(engine)
        stop = run(engine)
        assert isinstance(stop, PortOut)
        return stop.value

    def test_host_writes_between_runs(self, engine: UnicornEngine, memory: Memory) -> None:
        start_real(engine, memory, b"\xb0\x01\xe6\x80" + HLT)
        assert self.run_once(engine) == 1
        memory.write(CODE + 1, b"\x02")
        assert self.run_once(engine) == 2

    def test_host_writes_where_the_guest_stands(self, engine: UnicornEngine, memory: Memory) -> None:
        """No register is touched between the runs."""
        start_real(engine, memory, b"\xe6\x80\xb0\x01\xeb\xfa")  # 1: out 0x80, al; mov al, 1; jmp 1b
        assert [run(engine) for _ in range(3)][-1] == PortOut(0x80, 1, 1)
        memory.write(CODE + 3, b"\x02")
        assert run(engine) == PortOut(0x80, 1, 2)

    def test_guest_writes_data_beside_its_code(self, engine: UnicornEngine, memory: Memory) -> None:
        """What the guest itself stores in the page of its code is no reason to translate again."""
        code = b"\xfe\x06\x00\x18\xe6\x80\xeb\xf8"  # 1: inc byte [0x1800]; out 0x80, al; jmp 1b
        start_real(engine, memory, code)
        for i in range(5):
            assert run(engine) == PortOut(0x80, 1, 0)
            assert memory.word(0x1800, 1) == i + 1

    def test_guest_rewrites_its_own_code(self, engine: UnicornEngine, memory: Memory) -> None:
        code = (
            b"\xc6\x06\x06\x10\x07" + b"\xb0\x01" + b"\xe6\x80" + HLT
        )  # mov byte [0x1006], 7; mov al, 1; out 0x80, al
        start_real(engine, memory, code)
        assert run(engine) == PortOut(0x80, 1, 7)

    def test_page_remapped_after_flush(self, engine: UnicornEngine, memory: Memory) -> None:
        start_real(engine, memory, b"\xb0\x01\xe6\x80" + HLT)
        assert self.run_once(engine) == 1
        memory.write(0x9000, b"\xb0\x09\xe6\x80" + HLT)
        window = memory.window
        memory.translate = lambda gpa, write, private: Translation(  # type: ignore[method-assign]
            window.base + (0x9000 if gpa == CODE else gpa), True, window
        )
        engine.flush_tlb()
        assert self.run_once(engine) == 9

    def test_many_pages_are_checked_after_flush(self, engine: UnicornEngine, memory: Memory) -> None:
        """Beyond LIVE_MAX pages a host write is seen after flush_tlb."""
        pages = range(1, 9)
        for page in pages:  # mov al, page; out 0x80, al; jmp to the next page
            memory.write(page * PAGE, bytes((0xB0, page, 0xE6, 0x80, 0xE9)) + (PAGE - 7).to_bytes(2, "little"))
        memory.write(9 * PAGE, b"\xe9" + (-8 * PAGE - 3 & 0xFFFF).to_bytes(2, "little"))
        start_real(engine, memory, b"")
        assert [run(engine) for _ in pages] == [PortOut(0x80, 1, page) for page in pages]
        for page in pages:
            memory.write(page * PAGE + 1, bytes((page + 100,)))
        engine.flush_tlb()
        assert [run(engine) for _ in pages] == [PortOut(0x80, 1, page + 100) for page in pages]


class TestSlices:
    COUNT = b"\x48\x83\x07\x01\x48\xff\xc1\xeb\xf7"  # 1: add qword [rdi], 1; inc rcx; jmp 1b

    def start(self, engine: UnicornEngine, memory: Memory, code: bytes = COUNT, address: int = CODE) -> None:
        start_long(engine, memory, code, address)
        regs = engine.get_regs()
        regs.rdi = DATA
        engine.set_regs(regs)

    def test_a_slice_ends_between_two_instructions(self, engine: UnicornEngine, memory: Memory) -> None:
        """Unicorn's own stop executes the ADD twice in most slices."""
        self.start(engine, memory)
        for _ in range(100):
            assert engine.run() == SliceOver()
            regs = engine.get_regs()
            assert regs.rip == CODE
            assert memory.word(DATA) == regs.rcx
        assert memory.word(DATA) > 100

    def test_a_loop_without_memory(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory, b"\x48\xff\xc1\xeb\xfb")  # 1: inc rcx; jmp 1b
        while engine.get_regs().rcx == 0:
            assert engine.run() == SliceOver()

    def test_two_engines_on_one_counter(self, engine: UnicornEngine, memory: Memory) -> None:
        """lock inc qword [rdi] ten thousand times on each; slices alternate."""
        source = b"\xf0\x48\xff\x07\x48\xff\xc9\x75\xf7" + HLT  # 1: lock inc [rdi]; dec rcx; jnz 1b; hlt
        other = UnicornEngine(memory)
        try:
            count = 2_000_000
            for each in (engine, other):
                self.start(each, memory, source)
                regs = each.get_regs()
                regs.rcx = count
                each.set_regs(regs)
            running = [engine, other]
            slices = 0
            while running:
                running = [each for each in running if each.run() == SliceOver()]
                slices += 1
            assert slices > 4
            assert memory.word(DATA) == 2 * count
        finally:
            other.close()

    def test_rep_is_interrupted_between_two_elements(self, engine: UnicornEngine, memory: Memory) -> None:
        code = b"\xf3\xaa" + HLT  # rep stosb
        self.start(engine, memory, code)
        regs = engine.get_regs()
        start, regs.rdi, regs.rcx, regs.rax = 0x200000, 0x200000, 8 << 20, 0x5A
        engine.set_regs(regs)
        while (regs := engine.get_regs()).rdi == start:
            assert engine.run() == SliceOver()
        assert regs.rip == CODE
        done = regs.rdi - start
        assert regs.rcx == (8 << 20) - done
        assert memory.read(start + done - 1, 2) == b"\x5a\x00"

    def test_another_thread(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory)
        stops: list[object] = []
        thread = threading.Thread(target=lambda: stops.append(engine.run()))
        thread.start()
        thread.join()
        assert stops == [SliceOver()]

    def test_a_forked_child_goes_on(self, engine: UnicornEngine, memory: Memory) -> None:
        self.start(engine, memory)
        assert engine.run() == SliceOver()
        child = os.fork()
        if child == 0:
            os._exit(0 if engine.run() == SliceOver() and memory.word(DATA) == engine.get_regs().rcx else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestModes:
    def test_guest_switches_to_protected_and_long_mode(self, engine: UnicornEngine, memory: Memory) -> None:
        code = assemble(
            """
            .code16
            lgdt [0x3000]
            mov eax, cr0
            or al, 1
            mov cr0, eax
            .byte 0x66, 0xea; .long protected; .word 8
            .code32
        protected:
            mov ax, 0x10
            mov ss, ax
            mov ds, ax
            out 0x80, al
            mov eax, 0x101000
            mov cr3, eax
            mov eax, 0x20
            mov cr4, eax
            mov ecx, 0xC0000080
            mov eax, 0x900
            xor edx, edx
            wrmsr
            mov eax, cr0
            or eax, 0x80000000
            mov cr0, eax
            out 0x81, al
            .byte 0xea; .long long_mode; .word 0x18
            .code64
        long_mode:
            mov rax, 0x1122334455667788
            mov ecx, 0xC0000101
            mov edx, 0xffff8000
            mov eax, 0x1000
            wrmsr
            out 0x82, al
            hlt
            """,
            bits=16,
        )
        start_long(engine, memory, b"")  # for the page tables
        gdt = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF)
        memory.write(0x3010, b"".join(entry.to_bytes(8, "little") for entry in gdt))
        memory.write(0x3000, (31).to_bytes(2, "little") + (0x3010).to_bytes(4, "little"))
        engine.set_sregs(Sregs())
        start_real(engine, memory, code)
        assert run(engine) == PortOut(0x80, 1, 0x10)
        sregs = engine.get_sregs()
        assert (sregs.cs.selector, sregs.cs.db, sregs.cs.l, sregs.cs.limit, sregs.cs.g) == (8, 1, 0, 0xFFFFFFFF, 1)
        assert (sregs.ss.selector, sregs.ss.dpl, sregs.efer, sregs.cr0 & 1) == (0x10, 0, 0, 1)
        assert (sregs.gdt.base, sregs.gdt.limit) == (0x3010, 31)
        assert isinstance(run(engine), PortOut)
        sregs = engine.get_sregs()
        assert (sregs.efer, sregs.cs.db, sregs.cs.l) == (0xD00, 1, 0)
        assert run(engine) == PortOut(0x82, 1, 0)
        sregs, regs = engine.get_sregs(), engine.get_regs()
        assert (sregs.cs.selector, sregs.cs.db, sregs.cs.l) == (0x18, 0, 1)
        assert (sregs.gs.base, sregs.cr3, sregs.cr4) == (0xFFFF800000001000, 0x101000, 0x20)
        assert regs.rax == 0x1000

    def test_real_mode_segments(self, engine: UnicornEngine, memory: Memory) -> None:
        start_real(engine, memory, b"\x8e\xd8\xa0\x04\x00\xe6\x80")  # mov ds, ax; mov al, [4]; out 0x80, al
        memory.write(0x12344, b"\x99")
        regs = engine.get_regs()
        regs.rax = 0x1234
        engine.set_regs(regs)
        assert run(engine) == PortOut(0x80, 1, 0x99)
        ds = engine.get_sregs().ds
        assert (ds.selector, ds.base) == (0x1234, 0x12340)

    def test_base_of_the_code_segment(self, engine: UnicornEngine, memory: Memory) -> None:
        sregs = Sregs()
        sregs.cs.base, sregs.cs.selector = 0x10000, 0x1000
        memory.write(0x10000 + 0x20, b"\xe6\x80\x40\xe6\x81\xf4")
        engine.set_sregs(sregs)
        engine.set_regs(Regs(rip=0x20))
        assert run(engine) == PortOut(0x80, 1, 0)
        assert engine.get_regs().rip == 0x22
        assert run(engine) == PortOut(0x81, 1, 1)
        assert run(engine) == Halt()
        assert engine.get_regs().rip == 0x26

    def test_cr8(self, engine: UnicornEngine, memory: Memory) -> None:
        start_long(engine, memory, b"\x44\x0f\x20\xc0\x48\xff\xc0\x44\x0f\x22\xc0" + HLT)  # rax = cr8 + 1; cr8 = rax
        sregs = engine.get_sregs()
        sregs.cr8, sregs.apic_base = 5, 0x12345000
        engine.set_sregs(sregs)
        assert run(engine) == Halt()
        assert engine.get_regs().rax == 6
        assert (engine.get_sregs().cr8, engine.get_sregs().apic_base) == (6, 0x12345000)

    def test_sregs_that_no_descriptor_has(self, engine: UnicornEngine) -> None:
        """The hidden part comes from the caller, not from guest memory."""
        sregs = Sregs()
        for i, segment in enumerate((sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss)):
            segment.base, segment.limit, segment.selector = 0x1111_0000 * (i + 1), 0x2222 + i, 0x3330 + i * 8
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector = 0xFFFF_8000_0000_1000, 0x67, 0x40
        sregs.ldt.base, sregs.ldt.selector, sregs.ldt.present, sregs.ldt.unusable = 0x7777, 0x48, 0, 1
        sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x8888, 0x99, 0xAAAA, 0xBB
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = 0x8005_0033, 1 << 63, 0x1_2345_6000, 0x3406F0, 0xD01
        engine.set_sregs(sregs)
        assert engine.get_sregs() == sregs


class TestLifecycle:
    def test_close_is_idempotent_and_final(self, memory: Memory) -> None:
        engine = UnicornEngine(memory)
        start_real(engine, memory, HLT)
        assert run(engine) == Halt()
        engine.close()
        engine.close()
        with pytest.raises(ValueError, match="closed"):
            run(engine)
        with pytest.raises(ValueError, match="closed"):
            engine.get_regs()

    def test_nothing_is_left_of_many_engines(self, memory: Memory) -> None:
        def resident() -> int:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * 4

        def use(n: int) -> None:
            for _ in range(n):
                engine = UnicornEngine(memory)
                start_real(engine, memory, b"\xe6\x80" + HLT)
                assert run(engine) == PortOut(0x80, 1, 0)
                engine.close()

        use(20)
        before = resident()
        use(60)
        assert resident() - before < 60 * 100, "KiB"

    def test_an_engine_that_was_not_closed_is_collected(self, memory: Memory) -> None:
        engine = UnicornEngine(memory)
        start_real(engine, memory, HLT)
        run(engine)
        finalizer = engine._finalizer
        gone = weakref.ref(engine)
        del engine
        gc.collect()
        assert gone() is None
        assert not finalizer.alive


def test_shutdown_and_failed_say_where(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\x0f\x0b")  # ud2, with an empty IDT
    assert run(engine) == Shutdown()
    assert engine.get_regs().rip == CODE
    start_long(engine, memory, b"\xff\xe0")  # jmp rax
    regs = engine.get_regs()
    regs.rax = 0xFEE00000
    engine.set_regs(regs)
    memory.translate  # noqa: B018
    stop = run(engine)
    assert isinstance(stop, Shutdown | Failed)
