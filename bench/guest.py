"""What a guest costs: exits through KVM_RUN, faults on first touch, and the speed of its code.

The peer of the code's speed is Unicorn alone: the same loop, no hook but a TLB fill. The peer of an exit is a bare
`run()` of the engine, so the ratio is what KVM's layer adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from unicorn import unicorn_const, x86_const
from unicorn.unicorn_py3.unicorn import Uc

from bench.harness import Row, Work, compare, report, show
from guestmem.cpu import boot
from guestmem.host import Host, VcpuHandle
from guestmem.kvm.exits import HltExit
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType

MEMORY, TABLES, STACK, CODE, DATA = 64 << 20, 0x10000, 0x80000, 0x100000, 0x200000
DEVICE = MEMORY  # no memslot
MAPPED = MEMORY + (2 << 20)
OUT = b"\xe6\x80\xeb\xfc"  # 1: out 0x80, al; jmp 1b
HALT = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
IN = b"\xe4\x80\xeb\xfc"  # 1: in al, 0x80; jmp 1b
DEVICE_READ = b"\x48\x8b\x07\xeb\xfb"  # 1: mov rax, [rdi]; jmp 1b
TOUCH = b"\x88\x07\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9\x75\xf2\xf4"  # mov [rdi], al; add rdi, 4096; dec rcx; jnz
ALU = b"\x48\x01\xc8\x48\x31\xc3\x48\xff\xc9\x75\xf5\xf4"  # add rax, rcx; xor rbx, rax; dec rcx; jnz; hlt
LOADS = (  # again: mov rdi, rsi; mov rcx, rdx; 1: mov rbx, [rdi]; add rbx, 1; mov [rdi], rbx; add rdi, 8; dec rcx; jnz
    b"\x48\x89\xf7\x48\x89\xd1\x48\x8b\x1f\x48\x83\xc3\x01\x48\x89\x1f\x48\x83\xc7\x08\x48\xff\xc9\x75\xed"
    b"\x48\xff\xcd\x75\xe2\xf4"  # dec rbp; jnz again; hlt
)


class Guest:
    """One vCPU in long mode at `code`, its memory private from the start."""

    def __init__(self, host: Host, code: bytes, **registers: int) -> None:
        self.vm = host.create_vm(VmType.SW_PROTECTED)
        self.gmem = self.vm.create_guest_memfd(MEMORY, mmap=True, init_shared=True)
        self.vm.set_memory_region(0, 0, MEMORY, gmem=self.gmem)
        view = self.gmem.mmap()
        view.write(CODE, code)
        self._start = boot.long_mode(CODE, STACK, TABLES, MAPPED, view.write)
        self.gmem.convert(0, MEMORY, Access.PRIVATE)
        self.vcpu: VcpuHandle = self.vm.create_vcpu()
        self.vcpu.engine.set_sregs(self._start.sregs)
        self.restart(**registers)

    def restart(self, **registers: int) -> None:
        for name, value in registers.items():
            setattr(self._start.regs, name, value)
        self.vcpu.engine.set_regs(self._start.regs)

    def to_the_end(self) -> float:
        """Seconds until it halts."""
        began = time.perf_counter()
        while not isinstance(self.vcpu.run(), HltExit):
            pass
        return time.perf_counter() - began


def run() -> None:
    with Host() as host:
        exits = [
            compare("OUT", *_exits(Guest(host, OUT)), "exit"),
            compare("IN", _repeat(Guest(host, IN).vcpu.run), unit="exit"),
            compare("HLT", *_exits(Guest(host, HALT)), "exit"),
            compare("MMIO read", _repeat(Guest(host, DEVICE_READ, rdi=DEVICE).vcpu.run), unit="exit"),
        ]
        report("exits", "engine alone", exits)
        report("faults of a guest", "", [compare("first touch of a private page", _touches(host), unit="page")])
        speeds = [
            _speed(host, "ALU loop", ALU, 4 * 40_000_000, rcx=40_000_000),
            _speed(host, "load, add, store loop", LOADS, 6 * 40 * 10**6, rsi=DATA, rdx=10**6, rbp=40),
        ]
    report("code", "Unicorn alone", speeds)


def _exits(guest: Guest) -> tuple[Work, Work]:
    """Exits of the vCPU, and of its engine with nothing around it."""
    return _repeat(guest.vcpu.run), _repeat(guest.vcpu.engine.run)


def _repeat(call: Callable[[], object]) -> Work:
    def work(count: int) -> None:
        for _ in range(count):
            call()

    return work


def _touches(host: Host) -> Work:
    """Stores to pages that are not there, one after another; a hole over all of them once a round."""
    guest = Guest(host, TOUCH)
    pages = (MEMORY - DATA) >> 12

    def work(count: int) -> None:
        while count > 0:
            now = min(count, pages)
            guest.gmem.punch_hole(DATA, MEMORY - DATA)
            guest.restart(rip=CODE, rdi=DATA, rcx=now)
            guest.to_the_end()
            count -= now

    return work


def _speed(host: Host, name: str, code: bytes, instructions: int, **registers: int) -> Row:
    """Time of an instruction, ours and Unicorn's, in turns."""
    guest = Guest(host, code)
    ours, alone = [], []
    for _ in range(3):
        guest.restart(rip=CODE, **registers)
        ours.append(guest.to_the_end() / instructions)
        alone.append(_bare(guest, registers) / instructions)
    ratio = sorted(a / b for a, b in zip(ours, alone, strict=True))[1]
    return Row(name, show(sorted(ours)[1], "instruction"), show(sorted(alone)[1], "instruction"), ratio)


def _bare(guest: Guest, registers: dict[str, int]) -> float:
    """Seconds for the guest's code on Unicorn with a TLB that maps guest addresses straight to the file."""
    base, size = guest.gmem.inode.backing.window(guest.gmem.inode.folios.present.min())  # type: ignore[arg-type]

    def fill(_uc: Uc, linear: int, kind: int, entry: Any, _data: object) -> bool:
        # Data is not executable: Unicorn takes each store to an executable page the slow way.
        entry.paddr, entry.perms = base + linear, 7 if kind == unicorn_const.UC_MEM_FETCH else 3
        return True

    machine: Any = Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
    machine.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC)
    machine.ctl_set_tlb_mode(unicorn_const.UC_TLB_VIRTUAL)
    machine.hook_add(unicorn_const.UC_HOOK_TLB_FILL, fill)
    machine.mem_map_ptr(base, size, 7, base)
    for name, value in {"rsp": STACK, **registers}.items():
        machine.reg_write(getattr(x86_const, f"UC_X86_REG_{name.upper()}"), value)
    began = time.perf_counter()
    machine.emu_start(CODE, 0)
    return time.perf_counter() - began
