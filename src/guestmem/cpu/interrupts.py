"""Interrupts and NMIs from outside, and the moment at which the guest takes one.

Between two passes the moment is looked for in the registers. During a pass the CPU looks for it: it is told that an
interrupt of its SVM host is pending (CPU_INTERRUPT_VIRQ), and exits in front of the first instruction at which it could
be taken. An NMI that is masked waits in the same way for the IRET that ends the last one.

Source: arch/x86/kvm/x86.c kvm_check_and_inject_events, dm_request_for_irq_injection.
"""

from __future__ import annotations

from guestmem.cpu.cpu_state import HF2_NMI, HF_INHIBIT_IRQ, REQUEST_NMI, REQUEST_VIRQ
from guestmem.cpu.engine import InterruptWindow
from guestmem.cpu.exceptions import NMI, RFLAGS_IF, Event
from guestmem.cpu.uc_core import Core


class Interrupts:
    """`vector` is the interrupt that waits, `nmi` whether an NMI does; `window`: the VMM wants to know the moment."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.vector: int | None = None
        self.nmi = False
        self.window = False

    @property
    def shadow(self) -> bool:
        """Whether STI or MOV SS keeps interrupts off for one instruction."""
        return bool(self._core.cpu.env.hflags & HF_INHIBIT_IRQ)

    @property
    def open(self) -> bool:
        """Whether an interrupt could be taken now."""
        return bool(self._core.cpu.env.eflags & RFLAGS_IF) and not self.shadow

    @property
    def must_step(self) -> bool:
        """An NMI that only the shadow keeps off: one instruction, and it is taken."""
        return self.nmi and self.shadow and not self._core.cpu.env.hflags2 & HF2_NMI

    def poll(self) -> Event | InterruptWindow | None:
        """What happens before the next instruction. None: the CPU looks out for what waits."""
        cpu, request = self._core.cpu, 0
        if self.nmi:
            if not cpu.env.hflags2 & HF2_NMI and not self.shadow:
                self.nmi = False
                cpu.env.hflags2 |= HF2_NMI
                return Event(NMI, external=True)
            request = REQUEST_NMI if cpu.env.hflags2 & HF2_NMI else 0
        if self.vector is not None or self.window:
            if self.open:
                vector, self.vector = self.vector, None
                return InterruptWindow() if vector is None else Event(vector, external=True)
            request |= REQUEST_VIRQ
        cpu.interrupt_request.value |= request
        return None
