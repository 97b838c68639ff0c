"""What KVM and the IOMMU ask of the hardware and firmware that protect a guest's memory.

Two levels. A `Platform` is one machine's: the tables that say who owns each page (RMP, PAMT, GPT, pKVM's page states)
and the calls that change them. A `GuestArchitecture` is one virtual machine's, and what KVM calls; it moves with the
identity. guest_memfd itself talks to neither (seed.md R10).

All calls are synchronous and leave nothing half done. What hardware or firmware refuses is raised as `FirmwareError`,
with the return code of the manual; KVM makes a Refusal, or a bad page, of it.

Bytes. Guest code runs on raw host memory, so a page that is the guest's holds plaintext there while no host can reach
it. When it becomes the host's again the architecture puts there what the hardware would show: ciphertext, zeros, or the
same.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from errno import EIO
from typing import Any, NamedTuple, Protocol, TypeAlias

from guestmem.arch.dma import Block, DmaRules
from guestmem.cpu.engine import PageBit, Pvalidate, Rmpadjust
from guestmem.cpu.registers import Regs, Sregs
from guestmem.memory import Pfn


class FirmwareError(Exception):
    """A call of hardware or firmware that did not succeed. `code` is the manual's name of what it returned.

    `corrected` is what firmware would have accepted, where it says so (SNP's CPUID page). `answer` is the errno that
    KVM makes of it.
    """

    answer = EIO

    def __init__(self, call: str, code: str, corrected: bytes | None = None, **facts: object) -> None:
        self.call = call
        self.code = code
        self.corrected = corrected
        self.facts = facts
        super().__init__(f"{call} returned {code}" + "".join(f", {name} {value}" for name, value in facts.items()))


class Lifetime(enum.Enum):
    """How long a page's entry in the ownership table lasts, if the page is not converted and does not leave the file.

    BINDING: to the end of the memslot's binding. FOLIO: as long as the page is in the file. VM: to the end of the
    virtual machine. Source: spec/seed.md section 6.
    """

    BINDING = "binding"
    FOLIO = "folio"
    VM = "vm"


class Accept(NamedTuple):
    """TDG.MEM.PAGE.ACCEPT of the page at `gpa`, of 2M with `large`."""

    gpa: int
    large: bool


class Done(NamedTuple):
    """A guest's instruction was executed: what it leaves in the register of its result."""

    value: int


class Raises(NamedTuple):
    """It raises an exception in the guest."""

    vector: int
    error_code: int = 0


class Faults(NamedTuple):
    """A nested page fault, and it is repeated: KVM is to map the page; with smaller entries, if `smaller`."""

    smaller: bool = False


UNDEFINED = Raises(6)
"""#UD: no such instruction."""

GuestInstruction: TypeAlias = Pvalidate | Rmpadjust | Accept
Outcome: TypeAlias = Done | Raises | Faults


class StatePages(Protocol):
    """Pages that the guest itself made for the state of a vCPU: SNP's VMSAs."""

    def gfn(self, vcpu: int) -> int | None:
        """Where the page of a vCPU is; None if it has none that the guest made."""
        ...

    def page(self, vcpu: int) -> Pfn | None:
        """Which page that is."""
        ...

    def use(self, vcpu: int, gfn: int, block: Block) -> None:
        """From now on a vCPU, which is outside, enters with this page (order 0)."""
        ...

    def drop(self, vcpu: int) -> None:
        """A vCPU, which is outside, has no page, and cannot enter."""
        ...

    def load(self, vcpu: int) -> tuple[Regs, Sregs]:
        """The registers in the page that the guest made."""
        ...

    def save(self, vcpu: int, regs: Regs, sregs: Sregs) -> None:
        """They go into it."""
        ...

    def is_good(self, vcpu: int) -> bool:
        """Whether hardware would let the vCPU enter with its page."""
        ...


class Owner(NamedTuple):
    """Whose a page is: number and generation of the identity, and the guest frame it is at, where the table knows."""

    number: int
    generation: int
    gfn: int | None


class GuestArchitecture(Protocol):
    """One virtual machine as its architecture knows it.

    `has_tables` is false where no page has an owner, and `has_vcpus` where no vCPU is known to hardware or firmware:
    KVM need not call what is about them. `dma` is what the IOMMU asks, None where nothing stands between a device and
    memory but the IOMMU's own tables.
    """

    has_tables: bool
    has_vcpus: bool

    @property
    def page_bit(self) -> PageBit | None:
        """The bit of the guest's page tables that says private or shared, for engines; None where they have none.

        None for realms and pKVM guests as well, in which the top bit of an address says it: engines are x86.
        """
        ...

    @property
    def state_pages(self) -> StatePages | None:
        """None where guests make no such pages."""
        ...

    @property
    def dma(self) -> DmaRules | None: ...

    @property
    def launched(self) -> bool:
        """Whether its vCPUs may run."""
        ...

    def leaf_order(self, gfn: int, block: Block) -> int:
        """The largest order, up to the block's, that a private leaf over it may have: what the tables hold already."""
        ...

    def make_private(self, gfn: int, block: Block) -> None:
        """Before a private leaf is installed over `block` at `gfn`. Nothing to do for pages that are this guest's.

        Source: kvm_arch_gmem_prepare, make_private in v8; mmu_lock held. Raises: FirmwareError.
        """
        ...

    def make_shared(self, blocks: Sequence[Block]) -> None:
        """The blocks are the host's from now on, their bytes what the hardware leaves. No leaf of KVM's shows them.

        Nothing to do for pages that are the host's. All of them or none: what may fail and destroys nothing goes
        first, what was given back before another failed is the guest's again. Where hardware cannot undo that,
        docs/arch/lifetime.md says what is lost. Source: v8's make_shared. Raises: FirmwareError, with the fact `pfn` of
        the page that failed.
        """
        ...

    def reclaim(self, block: Block) -> None:
        """As make_shared, for pages that leave the file or, by policy, their binding: scrubbed where the architecture
        wants it. Source: kvm_arch_gmem_invalidate, reclaim in v8. Raises: FirmwareError: never recycle the page."""
        ...

    def invalidate(self, gfn: int, pages: int) -> None:
        """The private leaves over these frames were removed, no vCPU maps them, and the pages stay in the file. TDX:
        block, track, remove. Nothing to do for frames that have none; make_shared and reclaim do this themselves.
        Raises: FirmwareError, and the first frame that failed as its fact `gfn`."""
        ...

    def split(self, gfn: int, order: int) -> None:
        """The private leaf of `order` at `gfn` gives way to leaves one order down. PSMASH, DEMOTE, RTT unfold."""
        ...

    def merge(self, gfn: int, order: int) -> None:
        """Leaves one order down give way to one of `order` at `gfn`. PROMOTE, RTT fold. Raises: FirmwareError."""
        ...

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        """Whether the hardware lets the guest access a page through a private leaf of `order`; if not, it faults."""
        ...

    def start(self, parameters: Any = None) -> None:
        """Launch begins, with what the architecture wants to know (a policy's bits, a TdParams), None for its default.

        Raises: FirmwareError.
        """
        ...

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        """Launch: add one page (order 0) with the bytes of `source`, None for those that it has, and measure it.

        `kind` is the architecture's own number of a page type, 0 its ordinary one. Raises: FirmwareError.
        """
        ...

    def corrects(self, kind: int) -> bool:
        """Whether firmware may have another idea of a page of this kind, and `populate` fail with what it is."""
        ...

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: Any = None) -> bytes:
        """Launch ends; the measurement. `vcpu_states` are the vCPUs' registers, each a struct kvm_regs, by number;
        `parameters` the architecture's own (SNP's LaunchFinish).

        Raises: FirmwareError.
        """
        ...

    # vCPUs, by number. One that a helper has is ~number: firmware has never heard of it.

    @property
    def inside(self) -> AbstractSet[int]:
        """Those that are in guest mode."""
        ...

    def enter(self, vcpu: int) -> None:
        """Into the guest: VMRUN, TDH.VP.ENTER, RMI_REC_ENTER, __pkvm_vcpu_load. Raises: FirmwareError, it is outside;
        with the fact `no_vcpu` if there is none of this number, which KVM knows without asking."""
        ...

    def leave(self, vcpu: int) -> None:
        """Out again, of itself or because it was kicked. Nothing to do for one that is outside."""
        ...

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        """An instruction of the guest's about a page: done by the CPU or firmware, by the tables and what stage 2 maps
        there: the page and the order of its private leaf. #UD where the architecture has no such instruction."""
        ...

    def teardown(self) -> bool:
        """The virtual machine ends. Whether nothing names its identity now, so that the number may be used again."""
        ...


class Platform(Protocol):
    """One machine's side of an architecture. `has_private_memory` is what KVM asks of a VM's type."""

    name: str
    has_private_memory: bool

    def new_guest(self, number: int, generation: int) -> GuestArchitecture:
        """A virtual machine under an ASID, HKID, ... that nobody else has; `generation` is never used again."""
        ...

    def owner(self, pfn: Pfn) -> Owner | None:
        """Whose a page is; None if the host's."""
        ...

    def owned(self) -> Iterable[tuple[Pfn, Owner]]:
        """Every page that is not the host's."""
        ...

    def live_guests(self) -> int:
        """How many virtual machines firmware has a context of, without those that it would not give up."""
        ...

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        """What a host would see that reads a page, whosever it is. Raises: FirmwareError where the machine would not
        let it read, or would stop."""
        ...
