"""Architectures without tables: VMs without private memory, and software-protected VMs, whose pages are only noted as
private. The bytes stay what they are at conversion; for whoever wants to be sure that nobody relies on that there is
`scramble`.

Source: arch/x86/kvm: KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM; spec/semantics.md 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from guestmem.arch.architecture import UNDEFINED, GuestInstruction, Outcome, Owner
from guestmem.arch.dma import Block
from guestmem.memory import PAGE_SIZE, Pfn, read_host, write_host


class SoftwarePlatform:
    """No ownership tables. `scramble` changes the bytes at each conversion."""

    def __init__(self, *, has_private_memory: bool, scramble: bool = False) -> None:
        self.name = "software-protected" if has_private_memory else "default"
        self.has_private_memory = has_private_memory
        self._scramble = scramble and has_private_memory

    def new_guest(self, number: int, generation: int) -> SoftwareGuest:
        return SoftwareGuest(self._scramble)

    def owner(self, pfn: Pfn) -> Owner | None:
        return None

    def owned(self) -> Iterable[tuple[Pfn, Owner]]:
        return ()

    def live_guests(self) -> int:
        return 0

    def host_read(self, pfn: Pfn, hva: int) -> bytes:
        return read_host(hva, PAGE_SIZE)


class SoftwareGuest:
    """A virtual machine of such a platform. With `scramble` a page has other bytes after a conversion, either way."""

    launched = True
    page_bit = None
    state_pages = None
    has_vcpus = False
    inside: frozenset[int] = frozenset()
    dma = None

    def __init__(self, scramble: bool) -> None:
        self.has_tables = scramble
        self._private: set[Pfn] = set()

    def leaf_order(self, gfn: int, block: Block) -> int:
        return block.order

    def make_private(self, gfn: int, block: Block) -> None:
        for pfn, hva in _pages(block):
            if pfn not in self._private:
                self._private.add(pfn)
                _scramble(hva)

    def make_shared(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self.reclaim(block)

    def reclaim(self, block: Block) -> None:
        for pfn, hva in _pages(block):
            if pfn in self._private:
                self._private.remove(pfn)
                _scramble(hva)

    def invalidate(self, gfn: int, pages: int) -> None:
        """No leaves but KVM's own."""

    def split(self, gfn: int, order: int) -> None:
        """No leaves but KVM's own."""

    def merge(self, gfn: int, order: int) -> None:
        """No leaves but KVM's own."""

    def check_access(self, gfn: int, pfn: Pfn, order: int, write: bool) -> bool:
        return True

    def start(self, parameters: object = None) -> None:
        """Nothing begins."""

    def populate(self, gfn: int, block: Block, source: bytes | None, kind: int = 0) -> None:
        self._private.add(block.pfn)
        if source is not None:
            write_host(block.hva, source)

    def corrects(self, kind: int) -> bool:
        return False

    def finalize(self, vcpu_states: Mapping[int, bytes], parameters: object = None) -> bytes:
        return b""

    def enter(self, vcpu: int) -> None:
        """Nobody counts vCPUs."""

    def leave(self, vcpu: int) -> None:
        """Nobody counts vCPUs."""

    def execute(self, instruction: GuestInstruction, leaf: tuple[Pfn, int] | None) -> Outcome:
        return UNDEFINED

    def teardown(self) -> bool:
        return True


def _pages(block: Block) -> Iterable[tuple[Pfn, int]]:
    return ((Pfn(block.pfn + number), block.hva + number * PAGE_SIZE) for number in range(block.pages))


def _scramble(hva: int) -> None:
    write_host(hva, bytes(byte ^ 0xA5 for byte in read_host(hva, PAGE_SIZE)))
