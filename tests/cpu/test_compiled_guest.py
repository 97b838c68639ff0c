"""A guest that gcc compiled: optimised C with SSE2, its own IDT and handlers, in four and in five levels of paging.

The registers that it starts with are those of the kernel's KVM selftests (tools/testing/selftests/kvm/lib/x86_64):
neither CR0.WP nor CR0.ET, FS and SS as reset left them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guestmem.cpu.engine import Halt, PortOut, Stage2Miss, Stop
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from guestmem.cpu.x86 import CR4_LA57, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, PTE_P, PTE_W
from tests.cpu.guests import PAGE, SIZE, TABLES, Memory, run, start_long

CODE, STACK_TOP, IDT, GDT, ROOT5 = 0x10000, 0x80000, 0x90000, 0x91000, 0x92000
ABSENT = 0x7000_0000
SOURCE = r"""
typedef unsigned long u64; typedef unsigned int u32; typedef unsigned char u8;
struct frame { u64 regs[15], vector, error, rip, cs, rflags, rsp, ss; };
static u64 seen[64], cr2, sums[64]; static u8 buffer[9000], other[9000]; static double numbers[256];

static void out(u64 value) { asm volatile("outl %%eax, $0x80" :: "a"((u32)value), "D"(value)); }

__attribute__((used)) void handler(struct frame *f)
{
    seen[f->vector] += 1;
    if (f->vector == 14) asm volatile("mov %%cr2, %0" : "=r"(cr2));
    f->rip = f->regs[0];  /* where to go on, in rax */
    f->regs[1] = f->error;  /* rbx */
}

#define STUB(v, push) asm(".balign 32; stub" #v ": " push "; push $" #v "; jmp common");
asm(".balign 32; stubs:");
STUB(6, "push $0") STUB(13, "nop") STUB(14, "nop") STUB(32, "push $0")
asm("common: push %r15; push %r14; push %r13; push %r12; push %r11; push %r10; push %r9; push %r8; push %rdi;"
    "push %rsi; push %rbp; push %rdx; push %rcx; push %rbx; push %rax; mov %rsp, %rdi; cld; call handler;"
    "pop %rax; pop %rbx; pop %rcx; pop %rdx; pop %rbp; pop %rsi; pop %rdi; pop %r8; pop %r9; pop %r10; pop %r11;"
    "pop %r12; pop %r13; pop %r14; pop %r15; add $16, %rsp; iretq");
extern char stubs[];

static void gate(int vector, int stub)
{
    u64 to = (u64)stubs + stub * 32, *idt = (u64 *)0x90000 + vector * 2;
    idt[0] = (to & 0xffff) | 8UL << 16 | 0x8eUL << 40 | (to & 0xffff0000) << 32;
    idt[1] = to >> 32;
}

#define FAULTS(code, error) \
    asm volatile("lea 1f(%%rip), %%rax; " code "; 1:" : "=b"(error) :: "rax", "rcx", "memory")

static void *copy(void *to, const void *from, u64 n)
{
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) :: "memory");
    return to;
}
static void fill(void *to, int c, u64 n) { asm volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(c) : "memory"); }

__attribute__((section(".start"))) void _start(void)
{
    u64 error, total = 0; double sum = 0;
    for (int i = 0; i < 64; i++) sums[i] = 0;
    for (int i = 0; i < 256; i++) numbers[i] = i * 0.5;
    for (int i = 0; i < 256; i++) sum += numbers[i] * numbers[255 - i];
    out((u64)sum);
    fill(buffer, 0x5a, sizeof(buffer)); copy(other, buffer, sizeof(other));
    for (u32 i = 0; i < sizeof(buffer); i++) { other[i] ^= i; total += other[i]; }
    out(total);
    for (int round = 0; round < 100; round++)
        for (int i = 0; i < 64; i++) sums[i] = sums[(i + 1) % 64] * 6364136223846793005UL + round + i;
    out(sums[5] >> 32);
    gate(6, 0); gate(13, 1); gate(14, 2); gate(32, 3);
    FAULTS("ud2", error); out(seen[6] << 8 | error);
    FAULTS("mov $0x8000000000000000, %%rcx; mov (%%rcx), %%ecx", error); out(seen[13] << 8 | error);
    FAULTS("mov $0x1234567, %%ecx; rdmsr", error); out(seen[13] << 8 | error);
    FAULTS("movb $1, 0x70000123", error); out(seen[14] << 8 | error); out(cr2);
    FAULTS("int $32", error); out(seen[32]);
    static u64 lock; u64 old = 0;
    for (int i = 0; i < 1000; i++) {
        __sync_fetch_and_add(&lock, 3);
        while (!__sync_bool_compare_and_swap(&lock, lock, lock + 1));
        old += __sync_lock_test_and_set(&buffer[i], i);
        asm volatile("lock btsq %1, %0; lock btcq %1, %0" : "+m"(sums[0]) : "r"((u64)i % 64) : "cc");
    }
    out(lock); out(old);
    for (;;) asm volatile("hlt");
}
"""
EXPECTED_SEEN = [256 + 0, 256 + 0, 512 + 0, 256 + 2, ABSENT + 0x123, 1, 4000, 1000 * 0x5A]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not shutil.which("gcc"):
        pytest.skip("no compiler: gcc is needed")
    folder: Path = tmp_path_factory.mktemp("guest")
    (folder / "guest.c").write_text(SOURCE)
    script = f"SECTIONS {{ . = {CODE:#x}; .text : {{ *(.start) *(.text*) *(.rodata*) *(.data*) *(.bss*) *(COMMON) }} }}"
    (folder / "guest.ld").write_text(script)
    flags = "-O2 -msse2 -ffreestanding -fno-pic -no-pie -mno-red-zone -nostdlib -fno-stack-protector -static -w"
    command = ["gcc", *flags.split(), "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none", "-T", "guest.ld"]
    subprocess.run([*command, "-o", "guest", "guest.c"], check=True, cwd=folder)
    subprocess.run(["objcopy", "-O", "binary", "guest", "guest.bin"], check=True, cwd=folder)
    return (folder / "guest.bin").read_bytes()


def prepare(engine: UnicornEngine, memory: Memory, program: bytes, five_levels: bool) -> None:
    start_long(engine, memory, program, CODE)
    memory.write(GDT, b"".join(word.to_bytes(8, "little") for word in (0, 0xAF9B000000FFFF, 0xCF93000000FFFF)))
    reset = Sregs()
    data = Segment(0, 0xFFFFFFFF, 0x10, type=3, g=1)
    root = TABLES + PAGE
    if five_levels:
        memory.set_word(ROOT5, root | PTE_P | PTE_W)
        root = ROOT5
    sregs = Sregs(
        cs=Segment(0, 0xFFFFFFFF, 8, type=11, l=1, g=1), ds=data, es=data, gs=data, fs=reset.fs, ss=reset.ss,
        tr=Segment(0x93000, 0x67, 0x18, type=11, s=0), ldt=Segment(type=2, s=0, present=0, unusable=1),
        gdt=DescriptorTable(GDT, PAGE - 1), idt=DescriptorTable(IDT, PAGE - 1),
        cr0=1 << 31 | 1 << 5 | 1, cr3=root, cr4=CR4_PAE | 1 << 9 | (CR4_LA57 if five_levels else 0),
        efer=EFER_LME | EFER_LMA | EFER_NXE,
    )  # fmt: skip
    engine.set_sregs(sregs)
    engine.set_regs(Regs(rip=CODE, rsp=STACK_TOP - 8))


def outputs(engine: UnicornEngine, memory: Memory, revoke: bool = False) -> list[int]:
    """The values of all OUTs. `revoke`: at each one every page is taken away, to be missed again."""
    values: list[int] = []
    stop: Stop = run(engine)
    while stop != Halt():
        if isinstance(stop, Stage2Miss):
            memory.denied.remove(stop.gpa // PAGE)
        else:
            assert isinstance(stop, PortOut)
            values.append(engine.get_regs().rdi)
            if revoke:
                memory.denied.update(range(SIZE // PAGE))
                engine.flush_tlb()
        stop = run(engine)
    return values


@pytest.mark.parametrize("five_levels", [False, True], ids=["4 levels", "5 levels"])
def test_it_computes(engine: UnicornEngine, memory: Memory, program: bytes, five_levels: bool) -> None:
    prepare(engine, memory, program, five_levels)
    values = outputs(engine, memory)
    other = bytes(0x5A ^ i & 0xFF for i in range(9000))
    assert values[0] == int(sum(i * 0.5 * (255 - i) * 0.5 for i in range(256)))
    assert values[1] == sum(other)
    assert values[3:] == EXPECTED_SEEN


def test_it_computes_the_same_without_lasting_memory(engine: UnicornEngine, memory: Memory, program: bytes) -> None:
    prepare(engine, memory, program, False)
    expected = outputs(engine, memory)
    prepare(engine, memory, program, False)
    assert outputs(engine, memory, revoke=True) == expected
