"""The blocking facade: what a script does, without an await."""

from __future__ import annotations

import pytest

from guestmem import Access, Host, Refusal, SigBus, VmType
from guestmem.cpu.scripted import ScriptedEngine, Store

K = 4096


def test_the_session_of_the_readme() -> None:
    with Host() as host:
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(1 << 20, mmap=True, init_shared=True)
        vm.set_memory_region(slot=0, gpa=0, size=1 << 20, gmem=gmem)
        view = gmem.mmap()
        view[0:5] = b"hello"
        gmem.convert(0, K, Access.PRIVATE)
        with pytest.raises(SigBus):
            view[0]
        pin = gmem.pin(view, K, 1)
        with pytest.raises(Refusal, match=r"EAGAIN \[convert.busy\]"):
            gmem.convert(0, 1 << 20, Access.PRIVATE)
        pin.unpin()
        gmem.convert(0, K, Access.SHARED)
        assert view[0:5] == b"hello"
        assert gmem.accesses() == [(0, 1 << 20, Access.SHARED)]


def test_closing_a_host_gives_everything_back() -> None:
    host = Host(engine=lambda memory: ScriptedEngine(memory, [Store(0, 1)]))
    vm = host.create_vm(VmType.SW_PROTECTED)
    gmem = vm.create_guest_memfd(4 * K, mmap=True, init_shared=True)
    vm.set_memory_region(0, 0, 4 * K, gmem=gmem)
    gmem.mmap()[0] = 1
    vm.create_vcpu().run()
    host.anonymous(K)[0] = 1
    host.check()
    host.close()
    assert host.pool.statistics().allocated == 0
    assert host.inodes[0].backing.fd == -1  # type: ignore[attr-defined]


def test_a_hosts_memory_is_finite() -> None:
    with Host(memory=2 * K) as host:
        gmem = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(1 << 20)
        gmem.allocate(0, 2 * K)
        with pytest.raises(Refusal, match=r"ENOMEM \[pool.empty\]"):
            gmem.allocate(0, 4 * K)
        gmem.punch_hole(0, K)
        gmem.allocate(2 * K, K)


def test_an_inode_needs_no_kvm() -> None:
    """R13: the core works with no adapter registered."""
    from guestmem.memory import Abilities, page_range

    with Host() as host:
        inode = host.new_inode(size=1 << 20, abilities=Abilities(mmap=False, init_shared=False, convertible=True))
        pages = page_range(0, 1 << 20)
        assert pages is not None
        host.run(inode.convert(pages, Access.SHARED))
        host.run(inode.put())
        assert inode.destroyed
