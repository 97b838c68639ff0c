"""Who holds whom, in which order things end, and what identities are."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.host import Host
from guestmem.kvm.exits import HltExit
from guestmem.kvm.identity import IdentityPool
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from tests.kvm.conftest import Bench

K = PAGE_SIZE


def test_a_recycled_number_is_not_the_same_identity() -> None:
    """R26, known bug B39: the impostor has the number, never the generation."""
    pool = IdentityPool()
    first = pool.allocate()
    pool.free(first)
    second = pool.allocate()
    assert second.number == first.number
    assert second != first
    with pytest.raises(AssertionError, match="S8"):
        pool.free(first)


def test_identities_run_out() -> None:
    pool = IdentityPool(count=1)
    pool.allocate()
    with pytest.raises(Refusal) as caught:
        pool.allocate()
    assert (caught.value.errno, caught.value.rule) == (errno.EBUSY, "identity.exhausted")


def test_a_file_holds_its_vm_and_never_the_other_way(bench: Bench) -> None:
    gmem = bench.gmem()
    bench.vm.close()
    assert not bench.vm.kvm.destroyed
    gmem.allocate(0, K)
    gmem.close()
    assert bench.vm.kvm.destroyed
    assert not bench.host.identities.live


def test_a_vcpu_holds_its_vm_and_runs_without_the_vms_descriptor(bench: Bench) -> None:
    """Golden row G38."""
    gmem = bench.gmem()
    vcpu = bench.vcpu(Store(0, 4), Load(0))
    bench.vm.close()
    gmem.mmap()
    assert vcpu.run() == HltExit()
    gmem.close()
    vcpu.close()
    assert not bench.vm.kvm.destroyed, "the mapping holds the file, which holds the VM"
    bench.run(bench.host.process.mm.exit())
    assert bench.vm.kvm.destroyed


def test_bytes_outlive_memslots_and_descriptors_but_not_the_last_view(bench: Bench) -> None:
    gmem = bench.gmem()
    bench.guest(Store(0, 7))
    bench.vm.set_memory_region(0, 0, 0)
    view = gmem.mmap()
    assert view[0] == 7
    gmem.close()
    assert view[0] == 7
    assert bench.host.pool.statistics().allocated == 1
    bench.run(bench.host.process.mm.exit())
    assert bench.host.pool.statistics().allocated == 0


@pytest.mark.parametrize("order", list(itertools.permutations(("vm", "gmem", "vcpu", "mapping", "slot"))))
def test_every_order_of_taking_down_ends_with_nothing(order: tuple[str, ...]) -> None:
    """S21, L3: the VMM may do this in any order."""
    bench = Bench()
    gmem = bench.gmem()
    view = gmem.mmap()
    view[0] = 1
    gmem.convert(K, K, Access.PRIVATE)
    vcpu = bench.vcpu(Store(0, 2), Store(K, 3))
    vcpu.run()
    steps: dict[str, Callable[[], object]] = {
        "vm": bench.vm.close,
        "gmem": gmem.close,
        "vcpu": vcpu.close,
        "mapping": lambda: bench.run(bench.host.process.mm.unmap(view.hva, len(view))),
        "slot": lambda: bench.vm.set_memory_region(0, 0, 0),
    }
    for step in order:
        if step == "slot" and bench.vm.kvm.destroyed:
            continue
        steps[step]()
    assert bench.vm.kvm.destroyed
    assert gmem.inode.destroyed
    bench.close()


def test_a_thousand_vms_leave_nothing() -> None:
    with Host(memory=64 * K) as host:
        for _ in range(1000):
            vm = host.create_vm(VmType.SW_PROTECTED)
            gmem = vm.create_guest_memfd(4 * K, mmap=True, init_shared=True)
            gmem.allocate(0, 4 * K)
            vm.close()
            gmem.close()
        assert host.process.fds.open_fds() == []
        assert host.pool.statistics().allocated == 0
        assert not host.identities.live
        assert not host.process.mm.notifiers
