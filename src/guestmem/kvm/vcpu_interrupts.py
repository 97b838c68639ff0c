"""VcpuInterrupts: what is pending for a vCPU from outside, and how it gets into the guest.

    APIC, 8259A, KVM_NMI, INIT, SIPI -> pending here -> before the guest is entered: injected, or a window is asked for

The APIC calls `kick` when something may have become pending. A vCPU that sleeps needs no more, since its readiness is
asked (`sched`); one whose engine runs elsewhere is told by `on_kick`; one that runs here comes back within a slice.

Source: arch/x86/kvm/x86.c kvm_check_and_inject_events, kvm_vcpu_has_events, dm_request_for_irq_injection,
kvm_vcpu_ioctl_interrupt, kvm_vcpu_reset; irq.c kvm_cpu_has_interrupt, kvm_cpu_get_interrupt; lapic.c
kvm_apic_accept_events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from guestmem.cpu import msrs
from guestmem.cpu.engine import CpuState
from guestmem.cpu.registers import DebugRegisters, Events, Regs, Sregs
from guestmem.uapi.kvm import KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE

if TYPE_CHECKING:
    from guestmem.kvm.irqchip import Lapic
    from guestmem.kvm.vcpu import Vcpu

_CR0_ET, _CR0_NW, _CR0_CD = 1 << 4, 1 << 29, 1 << 30


class VcpuInterrupts:
    """Of one vCPU. `lapic` is None where the APIC is the VMM's, which then injects by KVM_INTERRUPT.

    `external_vector` waits for LINT0: what KVM_INTERRUPT brings with a split irqchip. `eoi_exit` is the vector whose
    end the VMM's IOAPIC is to hear of. `window_wanted` is the VMM's own wish, a field of struct kvm_run.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.lapic: Lapic | None = None
        self.nmi_pending = False
        self.external_vector: int | None = None
        self.eoi_exit: int | None = None
        self.window_wanted = False
        self.on_kick: Callable[[], None] | None = None

    def __fingerprint__(self) -> tuple[object, ...]:
        return self.nmi_pending, self.external_vector, self.eoi_exit, self.window_wanted, self.lapic

    @property
    def _cpu(self) -> CpuState:
        """The engine: one that takes interrupts is a real CPU."""
        return cast(CpuState, self._vcpu.engine)

    # What the APIC is wired to: irqchip.lapic.LapicCpu, irqchip.chip.EoiExit

    def kick(self) -> None:
        """Source: kvm_vcpu_kick, after kvm_make_request(KVM_REQ_EVENT)."""
        if self.on_kick is not None:
            self.on_kick()

    def inject_nmi(self) -> None:
        """At most one waits here, and another in the engine while the guest is in a handler. Source: kvm_inject_nmi,
        process_nmi."""
        self.nmi_pending = True
        self.kick()

    def tsc(self) -> int:
        return self._cpu.get_msr(msrs.TSC) or 0

    @property
    def tsc_khz(self) -> int:
        return msrs.TSC_KHZ

    def request_eoi_exit(self, vector: int) -> None:
        self.eoi_exit = vector

    # Pending

    def has_interrupt(self) -> bool:
        """Source: kvm_cpu_has_interrupt."""
        lapic = self.lapic
        if lapic is None:
            return False
        if lapic.irr:
            self._take_tpr(lapic)
        return lapic.pending_vector >= 0 or self._has_external()

    def _has_external(self) -> bool:
        """Source: kvm_cpu_has_extint."""
        lapic, irqchip = self.lapic, self._vcpu.kvm.irqchip
        if lapic is None or irqchip is None or not lapic.accepts_pic:
            return False
        return irqchip.pic.output if irqchip.pic is not None else self.external_vector is not None

    def wakes(self) -> bool:
        """Whether a halted vCPU goes on. Asked at every step of the scheduler: no side effect that counts."""
        if self.nmi_pending or self.has_start_event():
            return True
        return self.has_interrupt() and self._cpu.interrupt_flag

    def has_start_event(self) -> bool:
        """INIT or SIPI. Source: kvm_apic_has_pending_init_or_sipi."""
        return self.lapic is not None and (self.lapic.init_pending or self.lapic.sipi_pending)

    # On the way into the guest

    def inject(self) -> None:
        """Hand the engine what it takes now; for what it does not take yet, ask for the moment at which it does."""
        if self.nmi_pending:
            self.nmi_pending = False
            self._cpu.queue_nmi()
        if self.lapic is None or not self.has_interrupt():
            return
        if self._cpu.ready_for_interrupt_injection:
            self._cpu.queue_interrupt(self._acknowledge(self.lapic))
        if self.has_interrupt():
            self._cpu.request_interrupt_window = True

    def _acknowledge(self, lapic: Lapic) -> int:
        """An 8259A goes first: so does KVM. Source: kvm_cpu_get_interrupt."""
        if not self._has_external():
            return lapic.acknowledge()
        irqchip = self._vcpu.kvm.irqchip
        if irqchip is not None and irqchip.pic is not None:
            return irqchip.pic.acknowledge()
        vector, self.external_vector = self.external_vector, None
        assert vector is not None
        return vector

    def window_opened(self) -> bool:
        """The moment has come. Whether the VMM is to know; what waits here is injected before the next entry. The
        window closes: `inject` or the next KVM_RUN opens it again. Source: dm_request_for_irq_injection."""
        self._cpu.request_interrupt_window = self.window_wanted_now
        return self.window_wanted_now and not self.has_interrupt()

    @property
    def window_wanted_now(self) -> bool:
        """A VMM whose 8259A is in the kernel has nothing to inject."""
        irqchip = self._vcpu.kvm.irqchip
        return self.window_wanted and (irqchip is None or irqchip.pic is None)

    def want_window(self, wanted: bool) -> None:
        """What struct kvm_run asks for, at each KVM_RUN."""
        self.window_wanted = wanted
        self._cpu.request_interrupt_window = self.window_wanted_now

    @property
    def ready_for_injection(self) -> bool:
        """Field of struct kvm_run. Source: post_kvm_run_save, kvm_cpu_accept_dm_intr."""
        irqchip = self._vcpu.kvm.irqchip
        if irqchip is not None and irqchip.pic is not None:
            return True
        if self.lapic is not None and (self._has_external() or not self.lapic.accepts_pic):
            return False
        return self._cpu.ready_for_interrupt_injection

    # CR8 is the upper half of TPR, and the engine has it

    def set_cr8(self, value: int) -> None:
        """What struct kvm_run says at each KVM_RUN, where the APIC is the VMM's. Source: kvm_arch_vcpu_ioctl_run."""
        if self.lapic is None and value != self._cpu.cr8:
            self._cpu.cr8 = value & 15

    def _take_tpr(self, lapic: Lapic) -> None:
        """The guest may have written CR8. Source: sync_cr8_to_lapic."""
        cr8 = self._cpu.cr8
        if cr8 != lapic.tpr >> 4:
            lapic.tpr = cr8 << 4

    def give_tpr(self) -> None:
        """TPR was written. Source: sync_lapic_to_cr8."""
        if self.lapic is not None:
            self._cpu.cr8 = self.lapic.tpr >> 4

    # INIT and SIPI

    def accept_start_events(self) -> None:
        """A protected vCPU's state is not ours to reset. Source: kvm_apic_accept_events."""
        lapic, vcpu = self.lapic, self._vcpu
        if lapic is None or vcpu.guest_mode is not None:
            return
        if lapic.init_pending:
            lapic.init_pending = False
            self._init()
            vcpu.mp_state = KVM_MP_STATE_RUNNABLE if lapic.is_bsp else KVM_MP_STATE_INIT_RECEIVED
        if lapic.sipi_pending:
            lapic.sipi_pending = False
            if vcpu.mp_state == KVM_MP_STATE_INIT_RECEIVED:
                self._start_at(lapic.sipi_vector)
                vcpu.mp_state = KVM_MP_STATE_RUNNABLE

    def _init(self) -> None:
        """The state after INIT: as after reset, but for caching by CR0, the FPU, MSRs and the APIC's ID. Source: Intel
        SDM vol. 3, table 10-1; kvm_vcpu_reset."""
        engine, cpu, lapic = self._vcpu.engine, self._cpu, self.lapic
        assert lapic is not None
        lapic.reset(is_init=True)
        self.nmi_pending, self.external_vector = False, None
        caching = engine.get_sregs().cr0 & (_CR0_CD | _CR0_NW)
        cpu.set_events(Events())
        engine.set_sregs(Sregs(cr0=caching | _CR0_ET, apic_base=lapic.base))
        signature = self._vcpu.cpuid.get((1, 0), (0x600, 0, 0, 0))[0]
        engine.set_regs(Regs(rip=0xFFF0, rdx=signature))
        cpu.set_debug_registers(DebugRegisters())

    def _start_at(self, vector: int) -> None:
        """Real mode, at the page `vector`. Source: kvm_vcpu_deliver_sipi_vector."""
        engine = self._vcpu.engine
        sregs, regs = engine.get_sregs(), engine.get_regs()
        sregs.cs.selector, sregs.cs.base = vector << 8, vector << 12
        regs.rip = 0
        engine.set_sregs(sregs)
        engine.set_regs(regs)
