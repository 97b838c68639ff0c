"""Two and more CPUs at once, for test_parallel.py: the mode is one of a process. Exits with 1 if anything is wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from guestmem.cpu import block as b
from guestmem.cpu.engine import Halt
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


if __name__ == "__main__":
    b.library().cpu_set_mode(2)
    what, *numbers = sys.argv[1:]
    cases: dict[str, Callable[..., None]] = {
        "atomics": atomics,
        "modified_across": modified_across,
        "shared_nothing": shared_nothing,
    }
    cases[what](*map(int, numbers))
