"""A PC for guests in machine code: memory, controllers, vCPUs, and an IDT whose handlers say their vector and EOI it.

Port 0x10 is what the guest says, port 0xf4 ends the run. Time is a clock that moves only while every vCPU sleeps.
"""

from __future__ import annotations

import functools
import itertools
import struct
import time

from guestmem.cpu import boot
from guestmem.cpu.cpuid import default
from guestmem.host import Host, VcpuHandle
from guestmem.kvm.exits import Exit, IoExit, UninitializedExit
from guestmem.sched import ManualClock
from tests.cpu.guests import assemble

MS = 1_000_000
SIZE = 2 << 20
CODE, AP_CODE, STACK, IDT, DATA, TABLES, HANDLERS = 0x1000, 0x3000, 0x9000, 0xA000, 0xB000, 0x10000, 0x20000
SAY, END = 0x10, 0xF4
SECONDS = 30
EOI_BY = {
    "xapic": "mov edx, 0xfee000b0\n mov dword ptr [rdx], 0",
    "x2apic": "mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr",
    "pic": "mov al, 0x20\n out 0xa0, al\n out 0x20, al",
}
XAPIC_ON = """
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov dword ptr [rbx + 0x350], 0x10000
"""
FINISH = "out 0xf4, al\n"


class Machine:
    """`said` are the bytes that each vCPU has said, by its number."""

    def __init__(self, *, vcpus: int = 1, split_pins: int | None = None, pit: bool = False, eoi: str = "xapic") -> None:
        self.host = Host(memory=64 << 20)
        self.clock = ManualClock(start=1_000 * MS)
        self.host.scheduler.timers.clock = self.clock
        self.vm = self.host.create_vm()
        self.irqchip = self.vm.create_irqchip(split_pins=split_pins, pit=pit)
        self.memory = self.host.anonymous(SIZE)
        self.vm.set_memory_region(0, 0, SIZE, memory=self.memory)
        self.vcpus = [self.vm.create_vcpu(number) for number in range(vcpus)]
        for vcpu in self.vcpus:
            vcpu.vcpu.set_cpuid(with_apic_features(default(None)))
        self.deadline = time.monotonic() + SECONDS
        self.host.scheduler.observers.append(self._check_time)
        self.said: dict[int, list[int]] = {number: [] for number in range(vcpus)}
        self.memory.write(IDT, idt())
        self.memory.write(HANDLERS, handlers(eoi))

    def start(self, source: str) -> None:
        """64-bit code for the bootstrap processor, interrupts off, 4 GiB mapped to themselves."""
        self.memory.write(CODE, assemble(source, address=CODE))
        regs, sregs = boot.long_mode(CODE, STACK, TABLES, 1 << 32, self.memory.write)
        sregs.idt.base, sregs.idt.limit = IDT, 4095
        self.vcpus[0].engine.set_sregs(sregs)
        self.vcpus[0].engine.set_regs(regs)

    def start_ap(self, source: str) -> None:
        """16-bit code for whoever gets SIPI with the vector of `AP_CODE`."""
        self.memory.write(AP_CODE, assemble(source, bits=16, address=0))

    def run(self, *vcpus: VcpuHandle, limit: int = 2000) -> list[Exit]:
        """Run until a guest ends it: the other exits."""
        exits: list[Exit] = []
        for vcpu, exit_ in itertools.islice(self.host.run_vcpus(*(vcpus or self.vcpus)), limit):
            if isinstance(exit_, IoExit) and exit_.port == SAY:
                self.said[vcpu.vcpu.number].append(exit_.data)
            elif isinstance(exit_, IoExit) and exit_.port == END:
                return exits
            elif not isinstance(exit_, UninitializedExit):
                exits.append(exit_)
        raise AssertionError(f"not ended in {limit} exits: {exits[-3:]}, said {self.said}")

    def _check_time(self, _task: object) -> None:
        if time.monotonic() > self.deadline:
            self.deadline = float("inf")
            at = [hex(vcpu.engine.get_regs().rip) for vcpu in self.vcpus]
            raise AssertionError(f"not ended in {SECONDS} s: at {at}, said {self.said}")

    def word(self, gpa: int, size: int = 4) -> int:
        return int.from_bytes(self.memory.read(gpa, size), "little")

    def close(self) -> None:
        self.host.close()


def with_apic_features(
    table: dict[tuple[int, int], tuple[int, int, int, int]],
) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """APIC, x2APIC, TSC deadline."""
    a, b, c, d = table[1, 0]
    return table | {(1, 0): (a, b, c | 1 << 21 | 1 << 24, d | 1 << 9)}


def idt() -> bytes:
    gates = b""
    for vector in range(256):
        handler = HANDLERS + 64 * vector
        gates += struct.pack("<HHBBHII", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16, 0, 0)
    return gates


@functools.cache
def handlers(eoi: str) -> bytes:
    return assemble(
        f"""
        .set vector, 0
        .rept 256
        .balign 64
        push rax
        push rcx
        push rdx
        mov al, vector
        out 0x10, al
        {EOI_BY[eoi]}
        pop rdx
        pop rcx
        pop rax
        iretq
        .set vector, vector + 1
        .endr
        """,
        address=HANDLERS,
    )
