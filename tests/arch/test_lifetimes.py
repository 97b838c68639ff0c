"""How long a page's entry in the RMP lasts under each policy, event by event: the table of docs/arch/lifetime.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from guestmem.arch import Lifetime
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Host
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.memory import PAGE_SIZE, Access, PageIndex, Pfn
from guestmem.uapi.kvm import VmType

PAGE = Path(__file__).parents[2] / "docs/arch/lifetime.md"
MOVED = 1 << 20


class Bench:
    """An SNP guest that has stored a 7 into its page."""

    def __init__(self, lifetime: Lifetime) -> None:
        self.host = Host(memory=1 << 20, engine=lambda memory: ScriptedEngine(memory, []), lifetime=lifetime)
        self.vm = self.host.create_vm(VmType.SNP)
        self.vm.launch.start()
        self.vcpus = [self.vm.create_vcpu(number) for number in range(2)]
        self.vm.launch.finish()
        self.gmem = self.vm.create_guest_memfd(PAGE_SIZE, mmap=True)
        self.vm.set_memory_region(0, 0, PAGE_SIZE, gmem=self.gmem)
        assert self.guest(Store(0, 7)) == "works"
        pfn = self.gmem.inode.folios.pfn(PageIndex(0))
        assert pfn is not None
        self.pfn: Pfn = pfn

    def guest(self, *script: Load | Store) -> str:
        """Whether a guest that makes these accesses comes to its end, and what it read."""
        vcpu = self.vcpus.pop()
        assert isinstance(vcpu.engine, ScriptedEngine)
        vcpu.engine.script = list(script)
        exit_ = vcpu.run()
        if isinstance(exit_, MemoryFaultExit):
            return "faults"
        assert exit_ == HltExit()
        return "".join(f"reads {byte}" for byte in vcpu.engine.loaded) or "works"

    def entry(self) -> str:
        owner = self.host.platforms[VmType.SNP].owner(self.pfn)
        return "none" if owner is None else f"at {(owner.gfn or 0) << 12:#x}"


def delete(bench: Bench) -> str:
    bench.vm.set_memory_region(0, 0, 0)
    return bench.entry()


def rebind(bench: Bench, gpa: int) -> str:
    bench.vm.set_memory_region(0, 0, 0)
    bench.vm.set_memory_region(1, gpa, PAGE_SIZE, gmem=bench.gmem)
    return f"guest {bench.guest(Load(gpa))}"


def convert(bench: Bench) -> str:
    bench.gmem.convert(0, PAGE_SIZE, Access.SHARED)
    return bench.entry()


def punch(bench: Bench) -> str:
    bench.gmem.punch_hole(0, PAGE_SIZE)
    return bench.entry()


def link(bench: Bench) -> Gmem:
    """A view for a helper, which shows the page at the same address."""
    helper = bench.host.create_vm(VmType.SNP)
    helper.copy_enc_context_from(bench.vm)
    view = helper.link_guest_memfd(bench.gmem)
    helper.set_memory_region(0, 0, PAGE_SIZE, gmem=view)
    return view


def delete_linked(bench: Bench) -> str:
    link(bench)
    return delete(bench)


def close_view(bench: Bench) -> str:
    helper = bench.host.create_vm(VmType.SNP)
    helper.copy_enc_context_from(bench.vm)
    helper.link_guest_memfd(bench.gmem)
    bench.gmem.close()
    return bench.entry()


def close_file(bench: Bench) -> str:
    bench.gmem.close()
    return bench.entry()


def end(bench: Bench) -> str:
    bench.vm.set_memory_region(0, 0, 0)
    bench.host.close()
    return bench.entry()


EVENTS: list[tuple[str, Callable[[Bench], str], tuple[str, str, str]]] = [
    # event, what to do, what is seen under binding, folio, vm
    ("slot deleted", delete, ("none", "at 0x0", "at 0x0")),
    ("slot deleted, a helper has it bound", delete_linked, ("at 0x0", "at 0x0", "at 0x0")),
    ("rebound at the same address", lambda b: rebind(b, 0), ("guest reads 7", "guest reads 7", "guest reads 7")),
    ("rebound elsewhere", lambda b: rebind(b, MOVED), ("guest reads 7", "guest faults", "guest faults")),
    ("hole", punch, ("none", "none", "none")),
    ("converted to shared", convert, ("none", "none", "none")),
    ("view closed, another lives", close_view, ("none", "at 0x0", "at 0x0")),
    ("last file closed", close_file, ("none", "none", "none")),
    ("VM ended", end, ("none", "none", "none")),
]
POLICIES = (Lifetime.BINDING, Lifetime.FOLIO, Lifetime.VM)


@pytest.mark.parametrize(("event", "act", "seen"), EVENTS, ids=[event for event, _, _ in EVENTS])
def test_lifetime(event: str, act: Callable[[Bench], str], seen: tuple[str, str, str]) -> None:
    """Source: spec/seed.md section 6, spec/semantics.md section 12."""
    benches = [Bench(policy) for policy in POLICIES]
    assert tuple(act(bench) for bench in benches) == seen
    for bench in benches:
        if bench.host.userspace.processes:
            bench.host.close()


def test_the_table_in_the_docs() -> None:
    rows = re.findall(r"^\| ([a-zA-Z][^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    documented = {event: tuple(cells) for event, *cells in rows}
    for event, _, seen in EVENTS:
        assert documented[event] == seen, event
