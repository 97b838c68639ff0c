"""The registers of Unicorn's CPU, in a copy that is moved as a whole: 0.5 us each way.

`hflags` is QEMU's digest of the mode, from which it translates code. It follows from segments, control registers and
EFER; whoever sets those outside of an instruction recomputes it.
"""

from __future__ import annotations

import ctypes

from unicorn import x86_const

from guestmem.cpu import uc_native
from guestmem.cpu.guest_walk import CR0_PE, CR4_SMAP, EFER_LMA
from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.x86_env import GENERAL, SEGMENTS, Env, EnvTail, SegmentCache, env_layout

RFLAGS_ARITHMETIC, RFLAGS_DF, RFLAGS_VM = 0x8D5, 1 << 10, 1 << 17
HF_CPL, HF_CS64 = 3, 1 << 15
_HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_HF_LMA, _HF_OSFXSR, _HF_SMAP = 1 << 14, 1 << 22, 1 << 23
_HF_FPU = 7 << 9  # MP, EM and TS, eight bits above their place in CR0
_HF_MODE = HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG | _HF_PE | _HF_LMA | HF_CS64 | _HF_OSFXSR | _HF_SMAP | _HF_FPU
_HF2_VINTR = 1 << 3  # CR8 is v_tpr; without it QEMU drops what is written to CR8
_CC_OP_EFLAGS = 1
_CR4_OSFXSR = 1 << 9
_DESC_B, _DESC_L, _DESC_P = 1 << 22, 1 << 21, 1 << 15
_ES, _CS, _SS, _DS = (SEGMENTS.index(name) for name in ("es", "cs", "ss", "ds"))
_MASK_64 = (1 << 64) - 1


class CpuState:
    """One saved context of one CPU. `load` and `store` move it; the rest reads and patches the copy."""

    def __init__(self, handle: int) -> None:
        layout = env_layout()
        self._handle = handle
        self._context = uc_native.new_context(handle)
        self.env = Env.from_address(self._context + layout.env)
        self.tail = EnvTail.from_address(self._context + layout.tail)
        self._word = ctypes.c_uint64()
        self._word_ref = ctypes.byref(self._word)

    def load(self) -> None:
        """CPU to copy. Also right inside of a hook."""
        uc_native.context_save(self._handle, self._context)

    def store(self) -> None:
        """Copy to CPU. Not inside of a hook: translated code holds registers of its own."""
        # During a pass QEMU keeps arithmetic flags and DF apart from `eflags`; a pass begins by taking them from there.
        self.env.eflags = self.rflags
        uc_native.context_restore(self._handle, self._context)

    def free(self) -> None:
        """Give the copy back; nothing of it may be touched afterwards."""
        uc_native.context_free(self._context)

    @property
    def bytes(self) -> memoryview[int]:
        """`env` as bytes, for those who read many fields often."""
        return memoryview((ctypes.c_char * ctypes.sizeof(Env)).from_address(ctypes.addressof(self.env))).cast("B")

    @property
    def rflags(self) -> int:
        """RFLAGS, of which QEMU computes the arithmetic flags only when asked."""
        uc_native.context_reg_read(self._context, x86_const.UC_X86_REG_RFLAGS, self._word_ref)
        return self._word.value

    @rflags.setter
    def rflags(self, value: int) -> None:
        env = self.env
        env.cc_src, env.cc_op = value & RFLAGS_ARITHMETIC, _CC_OP_EFLAGS
        env.df = -1 if value & RFLAGS_DF else 1
        env.eflags = value | 2

    def get_regs(self) -> Regs:
        """A snapshot of the general registers. 4 us."""
        return Regs(**dict(zip(GENERAL, self.env.regs, strict=True)), rip=self.env.eip, rflags=self.rflags)

    def set_regs(self, regs: Regs) -> None:
        """All general registers, cut to 64 bits. 4 us."""
        self.env.regs[:] = [getattr(regs, name) & _MASK_64 for name in GENERAL]
        self.env.eip = regs.rip
        self.rflags = regs.rflags
        self.update_hflags()

    def get_sregs(self) -> Sregs:
        """A snapshot of all but `apic_base`, of which the CPU knows nothing. 12 us."""
        env = self.env
        es, cs, ss, ds, fs, gs = (_segment(cache) for cache in env.segs)
        return Sregs(
            cs=cs,
            ds=ds,
            es=es,
            fs=fs,
            gs=gs,
            ss=ss,
            tr=_segment(env.tr),
            ldt=_segment(env.ldt),
            gdt=DescriptorTable(env.gdt.base, env.gdt.limit),
            idt=DescriptorTable(env.idt.base, env.idt.limit),
            cr0=env.cr[0],
            cr2=env.cr[2],
            cr3=env.cr[3],
            cr4=env.cr[4],
            cr8=self.tail.v_tpr & 15,
            efer=env.efer,
        )

    def set_sregs(self, sregs: Sregs) -> None:
        """All of it but `apic_base`, as given; the mode follows. 8 us."""
        env = self.env
        for name, cache in zip(SEGMENTS, env.segs, strict=True):
            _fill(cache, getattr(sregs, name))
        _fill(env.tr, sregs.tr)
        _fill(env.ldt, sregs.ldt)
        env.gdt.base, env.gdt.limit = sregs.gdt.base, sregs.gdt.limit
        env.idt.base, env.idt.limit = sregs.idt.base, sregs.idt.limit
        env.cr[0], env.cr[2], env.cr[3], env.cr[4] = sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4
        env.efer = sregs.efer
        env.hflags2 |= _HF2_VINTR
        self.tail.v_tpr = sregs.cr8 & 15
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


def _segment(cache: SegmentCache) -> Segment:
    flags = cache.flags
    return Segment(
        base=cache.base,
        limit=cache.limit,
        selector=cache.selector & 0xFFFF,
        type=flags >> 8 & 15,
        present=flags >> 15 & 1,
        dpl=flags >> 13 & 3,
        db=flags >> 22 & 1,
        s=flags >> 12 & 1,
        l=flags >> 21 & 1,
        g=flags >> 23 & 1,
        avl=flags >> 20 & 1,
        unusable=1 - (flags >> 15 & 1),
    )


def _fill(cache: SegmentCache, segment: Segment) -> None:
    present = _DESC_P if segment.present and not segment.unusable else 0
    cache.selector, cache.base, cache.limit = segment.selector, segment.base, segment.limit
    cache.flags = (
        segment.type << 8 | segment.s << 12 | segment.dpl << 13 | present | segment.avl << 20 | segment.l << 21
        | segment.db << 22 | segment.g << 23
    )  # fmt: skip
