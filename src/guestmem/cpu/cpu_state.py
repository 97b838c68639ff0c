"""The registers of Unicorn's CPU, read and patched where they lie.

`hflags` is QEMU's digest of the mode, from which it translates code. It follows from segments, control registers and
EFER; whoever sets those outside of an instruction recomputes it.

Two bits of it are ours. HF_IOBPT: port instructions look for an I/O breakpoint (see `port_io`). HF_GUEST: the CPU is
the guest of an SVM host, so what that host asks for (`intercept`) ends a pass exactly: accesses to MSRs, writes to DR7,
the moment at which an interrupt or an NMI could be taken, and an INIT, which is how a slice is ended. Unicorn stops
there and enters no host.
"""

from __future__ import annotations

import ctypes
import functools
import struct

from guestmem.cpu import uc_native
from guestmem.cpu.guest_walk import CR0_PE, CR4_SMAP, EFER_LMA
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.x86_env import SEGMENTS, CpuMemory, Env, layout

RFLAGS_VM = 1 << 17
HF_CPL, HF_INHIBIT_IRQ, HF_CS64, HF_GUEST, HF_IOBPT = 3, 1 << 3, 1 << 15, 1 << 21, 1 << 24
HF2_NMI = 1 << 2
_HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_HF_LMA, _HF_OSFXSR, _HF_SMAP = 1 << 14, 1 << 22, 1 << 23
_HF_FPU = 7 << 9  # MP, EM and TS, eight bits above their place in CR0
_HF_MODE = HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG | _HF_PE | _HF_LMA | HF_CS64 | _HF_OSFXSR | _HF_SMAP | _HF_FPU
# With VINTR, CR8 is v_tpr, and QEMU keeps what is written to CR8; with GIF, interrupts may be pending.
_HF2_GIF, _HF2_VINTR = 1 << 0, 1 << 3
_CR4_OSFXSR = 1 << 9
_DESC_B, _DESC_L, _DESC_P = 1 << 22, 1 << 21, 1 << 15
_ES, _CS, _SS, _DS = (SEGMENTS.index(name) for name in ("es", "cs", "ss", "ds"))
_MASK_64 = (1 << 64) - 1

VMEXIT, EXIT_NMI, EXIT_INIT, EXIT_VINTR, EXIT_MSR = 0x100, 0x61, 0x63, 0x64, 0x7C
EXIT_WRITE_DR5, EXIT_WRITE_DR7 = 0x35, 0x37
"""Numbers of exits (AMD APM vol. 2, appendix C); a pass that one ends has VMEXIT + number as its exception."""
DR_WRITES = 1 << 5 | 1 << 7
_EXIT_INTR = 0x60
_INTERCEPTS = sum(1 << number - _EXIT_INTR for number in (EXIT_NMI, EXIT_INIT, EXIT_VINTR, EXIT_MSR))
REQUEST_VIRQ, REQUEST_NMI, REQUEST_INIT = 0x100, 0x200, 0x400
"""Of `interrupt_request`: what the last three of these exits are asked for by."""
_VMCB_MSRPM = 72  # offset of the address of the map of MSRs that are intercepted
_MSRPM_SIZE = 0x2000

_REGS = struct.Struct("<18Q")
_SEGMENTS = struct.Struct("<" + "I4xQII" * 10)


@functools.cache
def _vmcb() -> uc_native.Page:
    """What QEMU reads of the host's control block: that every MSR is intercepted."""
    vmcb = uc_native.Page(bytes(uc_native.Page.SIZE) + b"\xff" * _MSRPM_SIZE)
    ctypes.c_uint64.from_address(vmcb.address + _VMCB_MSRPM).value = vmcb.address + uc_native.Page.SIZE
    return vmcb


class Cpu(CpuMemory):
    """One CPU, in whose memory the pages of this process are at their own address.

    `view` are the bytes of `env`, for those who read many fields often.
    """

    def __init__(self, handle: int) -> None:
        super().__init__(handle, layout())
        self.view = memoryview((ctypes.c_char * ctypes.sizeof(Env)).from_address(self.address)).cast("B")
        self._saved = ctypes.create_string_buffer(self.size)
        vmcb = _vmcb()
        self.tail.vm_vmcb, self.tail.intercept, self.tail.intercept_dr_write = vmcb.address, _INTERCEPTS, DR_WRITES
        self.env.hflags |= HF_GUEST | HF_IOBPT
        self.env.hflags2 |= _HF2_GIF | _HF2_VINTR
        self.no_exit_request.value = 1

    def save(self) -> None:
        """Remember all registers. 0.2 us."""
        ctypes.memmove(self._saved, self.address, self.size)

    def restore(self) -> None:
        """The registers of the last `save`."""
        ctypes.memmove(self.address, self._saved, self.size)

    def get_regs(self) -> Regs:
        """A snapshot of the general registers."""
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *rest = _REGS.unpack_from(self.view)
        return Regs(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *rest)

    def set_regs(self, regs: Regs) -> None:
        """All general registers, cut to 64 bits."""
        r, mask, env = regs, _MASK_64, self.env
        virtual = (env.eflags ^ r.rflags) & RFLAGS_VM
        _REGS.pack_into(
            self.view, 0, r.rax & mask, r.rcx & mask, r.rdx & mask, r.rbx & mask, r.rsp & mask, r.rbp & mask,
            r.rsi & mask, r.rdi & mask, r.r8 & mask, r.r9 & mask, r.r10 & mask, r.r11 & mask, r.r12 & mask,
            r.r13 & mask, r.r14 & mask, r.r15 & mask, r.rip & mask, (r.rflags | 2) & mask,
        )  # fmt: skip
        if virtual:
            self.update_hflags()

    def get_sregs(self) -> Sregs:
        """A snapshot of all but `apic_base`, of which the CPU knows nothing."""
        env = self.env
        words = _SEGMENTS.unpack_from(self.view, Env.segs.offset)
        es, cs, ss, ds, fs, gs, ldt, tr = (_segment(*words[i : i + 4]) for i in range(0, 32, 4))
        cr0, _, cr2, cr3, cr4 = env.cr[:5]
        return Sregs(
            cs=cs,
            ds=ds,
            es=es,
            fs=fs,
            gs=gs,
            ss=ss,
            tr=tr,
            ldt=ldt,
            gdt=DescriptorTable(words[33], words[34]),
            idt=DescriptorTable(words[37], words[38]),
            cr0=cr0,
            cr2=cr2,
            cr3=cr3,
            cr4=cr4,
            cr8=self.tail.v_tpr & 15,
            efer=env.efer,
        )

    def set_sregs(self, sregs: Sregs) -> None:
        """All of it but `apic_base`, as given; the mode follows."""
        s, env = sregs, self.env
        words = [word for segment in (s.es, s.cs, s.ss, s.ds, s.fs, s.gs, s.ldt, s.tr) for word in _words(segment)]
        words += (0, s.gdt.base, s.gdt.limit, 0, 0, s.idt.base, s.idt.limit, 0)
        _SEGMENTS.pack_into(self.view, Env.segs.offset, *words)
        env.cr[0], env.cr[2], env.cr[3], env.cr[4] = s.cr0, s.cr2, s.cr3, s.cr4
        env.efer = s.efer
        self.tail.v_tpr = s.cr8 & 15
        self.update_hflags()

    def update_hflags(self) -> None:
        """The mode, from segments and control registers. Source: x86_update_hflags() of QEMU's target/i386/kvm.c."""
        env = self.env
        cs, cr0, cr4 = env.segs[_CS].flags, env.cr[0], env.cr[4]
        hflags = env.hflags & ~_HF_MODE | (env.segs[_SS].flags >> 13 & 3) | (cr0 << 8 & _HF_FPU)
        hflags |= (_HF_PE if cr0 & CR0_PE else 0) | (_HF_OSFXSR if cr4 & _CR4_OSFXSR else 0)
        hflags |= _HF_SMAP if cr4 & CR4_SMAP else 0
        if env.efer & EFER_LMA:
            hflags |= _HF_LMA
        if env.efer & EFER_LMA and cs & _DESC_L:
            hflags |= _HF_CS32 | _HF_SS32 | HF_CS64
        else:
            hflags |= (_HF_CS32 if cs & _DESC_B else 0) | (_HF_SS32 if env.segs[_SS].flags & _DESC_B else 0)
            bases = any(env.segs[i].base for i in (_DS, _ES, _SS))
            if bases or not cr0 & CR0_PE or env.eflags & RFLAGS_VM or not hflags & _HF_CS32:
                hflags |= _HF_ADDSEG
        env.hflags = hflags


def _segment(selector: int, base: int, limit: int, flags: int) -> Segment:
    return Segment(
        base, limit, selector & 0xFFFF, flags >> 8 & 15, flags >> 15 & 1, flags >> 13 & 3, flags >> 22 & 1,
        flags >> 12 & 1, flags >> 21 & 1, flags >> 23 & 1, flags >> 20 & 1, 1 - (flags >> 15 & 1),
    )  # fmt: skip


def _words(segment: Segment) -> tuple[int, int, int, int]:
    s = segment
    present = _DESC_P if s.present and not s.unusable else 0
    flags = s.type << 8 | s.s << 12 | s.dpl << 13 | present | s.avl << 20 | s.l << 21 | s.db << 22 | s.g << 23
    return s.selector, s.base, s.limit, flags
