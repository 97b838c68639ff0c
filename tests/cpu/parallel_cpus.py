"""Two and more CPUs at once, for test_parallel.py: the mode is one of a process. Exits with 1 if anything is wrong.

With 77 where something that it needs is not there.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable

import pytest

from guestmem.cpu import block as b
from guestmem.cpu.engine import Halt, SliceOver, Stage2Miss
from tests.cpu.guests import CODE, DATA, PAGE, TABLES, Memory, assemble
from tests.cpu.raw import Cpu, Space, at_once

ATOMICS = f"""
again:
    lock inc qword ptr [{DATA}]
    mov edx, 1
    lock xadd qword ptr [{DATA} + 8], rdx
1:  mov rax, [{DATA} + 16]
    lea rdx, [rax + 1]
    lock cmpxchg [{DATA} + 16], rdx
    jnz 1b
    lock inc qword ptr [{DATA} + 0x3c]
    dec r8
    jnz again
    mov r8, r9
wide:
    mov rax, [{DATA} + 0x80]
    mov rdx, [{DATA} + 0x88]
2:  mov rbx, rax
    mov rcx, rdx
    add rbx, 1
    adc rcx, 1
    lock cmpxchg16b [{DATA} + 0x80]
    jnz 2b
    dec r8
    jnz wide
    hlt
"""


def atomics(cpus: int, rounds: int, wide: int) -> None:
    memory = Memory()
    space = Space(memory)
    memory.write(CODE, assemble(ATOMICS))
    all_ = [Cpu(space) for _ in range(cpus)]
    for i, cpu in enumerate(all_):
        cpu.start(CODE, memory, 0x8000 + i * 0x1000, r8=rounds, r9=wide)
    at_once(*(lambda cpu=cpu: cpu.run_until(Halt) for cpu in all_))
    found = [memory.word(DATA + at) for at in (0, 8, 16, 0x3C, 0x80, 0x88)]
    want = [cpus * rounds] * 4 + [cpus * wide] * 2
    exclusive = sum(cpu.block.exclusive for cpu in all_)
    assert found == want, (found, want)
    assert exclusive >= cpus * (rounds + wide) // 2, exclusive
    for cpu in all_:
        cpu.close()
    space.close()


# One CPU writes `mov eax, n; ret` through another address, tells the other, and waits until it has executed it.
WRITER = f"""
    mov ecx, 1
again:
    mov dword ptr [0x80001], ecx
    mov [{DATA}], ecx
1:  pause
    cmp [{DATA} + 64], ecx
    jne 1b
    inc ecx
    cmp ecx, r8d
    jbe again
    hlt
"""
EXECUTOR = f"""
    mov ecx, 1
again:
1:  pause
    cmp [{DATA}], ecx
    jb 1b
    mov r10d, ecx
    xor eax, eax
    cpuid
    mov ecx, r10d
    call r9
    cmp eax, ecx
    je 2f
    inc r12
2:  mov [{DATA} + 64], ecx
    inc ecx
    cmp ecx, r8d
    jbe again
    hlt
"""


def modified_across(rounds: int) -> None:
    """Intel SDM vol. 3, 9.1.3: cross-modifying code with a flag and a serialising instruction."""
    memory = Memory()
    space = Space(memory)
    writer, executor = Cpu(space), Cpu(space)
    memory.write(CODE, assemble(WRITER))
    memory.write(0x2000, assemble(EXECUTOR, address=0x2000))
    memory.write(0x20000, b"\xb8\0\0\0\0\xc3")
    writer.start(CODE, memory, 0x8000, r8=rounds)
    executor.start(0x2000, memory, 0x9000, r8=rounds, r9=0x20000)
    memory.set_word(TABLES + 4 * PAGE + 0x80 * 8, 0x20003)  # linear 0x80000 is the page of linear 0x20000
    at_once(lambda: writer.run_until(Halt), lambda: executor.run_until(Halt))
    wrong = executor.get_regs().r12
    assert wrong == 0, f"{wrong} of {rounds} executions of stale code"
    for cpu in (writer, executor):
        cpu.close()
    space.close()


def shared_nothing(rounds: int) -> None:
    """Prints how two CPUs that share nothing scale."""
    memory = Memory()
    space = Space(memory)
    memory.write(CODE, b"\x48\xff\x03\x48\xff\xc9\x75\xf8\xf4")  # 1: inc [rbx]; dec rcx; jnz 1b; hlt

    def seconds(count: int) -> float:
        cpus = [Cpu(space) for _ in range(count)]
        for i, cpu in enumerate(cpus):
            cpu.start(CODE, memory, rbx=0x10000 + i * 0x1000, rcx=rounds)
        begin = time.monotonic()
        at_once(*(lambda cpu=cpu: cpu.run_until(Halt) for cpu in cpus))
        end = time.monotonic()
        for cpu in cpus:
            cpu.close()
        return end - begin

    one, two = seconds(1), seconds(2)
    print(f"scale {2 * one / two:.2f}")


def dropped(cpus: int, rounds: int) -> None:
    """Leaves are dropped under CPUs that write through them: no write comes after the drop has returned."""
    memory = Memory()
    space = Space(memory)
    memory.write(CODE, b"\x48\xff\x03\xeb\xfb")  # 1: inc [rbx]; jmp 1b
    all_ = [Cpu(space) for _ in range(cpus)]
    for i, cpu in enumerate(all_):
        cpu.start(CODE, memory, rbx=DATA + i * 64)
    over, closed = threading.Event(), threading.Event()

    def execute(cpu: Cpu) -> int:
        misses = 0
        while not over.is_set():
            stop = cpu.run()
            if isinstance(stop, Stage2Miss):
                misses += 1
                while closed.is_set() and not over.is_set():
                    time.sleep(0)
        return misses

    def drop() -> None:
        took = []
        for _ in range(rounds):
            time.sleep(2e-4)
            closed.set()
            began = time.monotonic()
            space.drop(DATA // PAGE, 1)
            took.append(time.monotonic() - began)
            before = memory.read(DATA, PAGE)
            time.sleep(1e-4)
            assert memory.read(DATA, PAGE) == before, "written after the drop"
            space.map(DATA // PAGE, 1, memory.window.base + DATA)
            closed.clear()
        over.set()
        for cpu in all_:
            cpu.kick()
        took.sort()
        print(f"drop under {cpus} CPUs: median {took[rounds // 2] * 1e6:.0f} us, worst {took[-1] * 1e6:.0f} us")

    misses = at_once(drop, *(lambda cpu=cpu: execute(cpu) for cpu in all_))[1:]
    assert all(isinstance(n, int) and n > rounds // 4 for n in misses), misses
    for i in range(cpus):
        assert memory.word(DATA + i * 64) > 0
    for cpu in all_:
        cpu.close()
    space.close()


def blocked() -> None:
    """A CPU that waits in a fault of the host holds nobody up: not one that must be alone, once it is kicked."""
    memory = Memory()
    space = Space(memory)
    absent = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(absent))
    uffd = register(address)
    far = 0x700000
    space.map(far // PAGE, 1, address)
    memory.write(CODE, b"\x8a\x03\xf4")  # mov al, [rbx]; hlt
    memory.write(0x2000, assemble("lock inc qword ptr [rbx + 0x3c]; hlt", address=0x2000))
    waiting, alone = Cpu(space), Cpu(space)
    waiting.start(CODE, memory, 0x8000, rbx=far)
    alone.start(0x2000, memory, 0x9000, rbx=DATA)

    def be_alone() -> None:
        os.read(uffd, 32)  # the fault: the other CPU is blocked in it
        kicker = threading.Timer(0.05, alone.kick)
        kicker.start()
        assert alone.run() == SliceOver()
        kicker.join()
        assert alone.get_regs().rip == 0x2000 and memory.word(DATA + 0x3C) == 0
        space.drop(DATA // PAGE, 1, wait=False)
        space.map(DATA // PAGE, 1, memory.window.base + DATA)
        fill(uffd, address)
        alone.run_until(Halt)
        assert memory.word(DATA + 0x3C) == 1

    at_once(lambda: waiting.run_until(Halt), be_alone)
    for cpu in (waiting, alone):
        cpu.close()
    space.close()


def register(address: int) -> int:
    """A userfaultfd for the page at `address`. Skips where there is none."""
    uffd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC)
    if uffd < 0:
        pytest.skip("no userfaultfd")
    fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 0, 0))  # UFFDIO_API
    fcntl.ioctl(uffd, 0xC020AA00, struct.pack("<QQQQ", address, PAGE, 1, 0))  # UFFDIO_REGISTER, missing
    return int(uffd)


def fill(uffd: int, address: int) -> None:
    """UFFDIO_ZEROPAGE."""
    fcntl.ioctl(uffd, 0xC020AA04, struct.pack("<QQQq", address, PAGE, 0, 0))


if __name__ == "__main__":
    b.library().cpu_set_mode(2)
    what, *numbers = sys.argv[1:]
    cases: dict[str, Callable[..., None]] = {
        "atomics": atomics,
        "modified_across": modified_across,
        "shared_nothing": shared_nothing,
        "dropped": dropped,
        "blocked": blocked,
    }
    try:
        cases[what](*map(int, numbers))
    except pytest.skip.Exception as missing:
        print(missing, file=sys.stderr)
        sys.exit(77)
