"""Moving and sharing an identity: the sequence of a migration, every refusal, and that nothing is left of thousands."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Vm
from guestmem.kvm.enc_context import move_enc_context_from
from guestmem.kvm.exits import HltExit
from guestmem.memory import PAGE_SIZE, Access
from guestmem.sched import Operation, Task, park
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from tests.kvm.conftest import Bench

K = PAGE_SIZE


def refused(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno, caught.value.rule


@pytest.fixture
def other(bench: Bench) -> Vm:
    return bench.host.create_vm(VmType.SW_PROTECTED)


def linked_and_bound(bench: Bench, gmem: Gmem, vm: Vm) -> Gmem:
    linked = vm.link_guest_memfd(gmem)
    vm.set_memory_region(0, 0, gmem.inode.size, gmem=linked)
    return linked


def loads(bench: Bench, vm: Vm, *script: Load | Store) -> list[int]:
    vcpu = bench.vcpu(*script, number=len(vm.kvm.vcpus), vm=vm)
    assert vcpu.run() == HltExit()
    vcpu.close()
    assert isinstance(vcpu.engine, ScriptedEngine)
    return vcpu.engine.loaded


def test_a_migration_link_bind_move_run(bench: Bench, other: Vm) -> None:
    """spec/semantics.md section 12. Private bytes and the state of every page are there; the source is dead."""
    gmem = bench.gmem()
    gmem.convert(0, 2 * K, Access.PRIVATE)
    source = bench.vcpu(Store(0, 5), Store(4 * K, 6))
    source.run()
    identity = bench.vm.kvm.machine.identity
    linked_and_bound(bench, gmem, other)
    other.move_enc_context_from(bench.vm)
    assert other.kvm.machine.identity == identity
    assert loads(bench, other, Load(0), Load(4 * K)) == [5, 6]
    assert refused(source.run) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: bench.vm.set_memory_region(0, 0, 0)) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: bench.vm.create_guest_memfd(K)) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: bench.vm.create_vcpu(5)) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: bench.vm.link_guest_memfd(gmem)) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: bench.vm.move_enc_context_from(other)) == (errno.EIO, "ioctl.vm_dead")
    assert refused(lambda: gmem.convert(0, K, Access.SHARED)) == (errno.EINVAL, "attributes2.owner")


def test_there_and_on_again(bench: Bench, other: Vm) -> None:
    """A third VM takes it from the second, and links through the first one's file."""
    gmem = bench.gmem()
    loads(bench, bench.vm, Store(0, 5))
    linked_and_bound(bench, gmem, other)
    other.move_enc_context_from(bench.vm)
    third = bench.host.create_vm(VmType.SW_PROTECTED)
    linked_and_bound(bench, gmem, third)
    third.move_enc_context_from(other)
    assert loads(bench, third, Load(0)) == [5]


def test_the_bytes_stay_when_the_source_goes_at_any_point(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem(init_shared=False, mmap=False)
    loads(bench, bench.vm, Store(0, 5))
    linked_and_bound(bench, gmem, other)
    gmem.close()
    other.move_enc_context_from(bench.vm)
    bench.vm.close()
    assert loads(bench, other, Load(0)) == [5]


def test_each_bad_source_or_destination_has_its_errno_and_the_source_goes_on(bench: Bench, other: Vm) -> None:
    host, vm = bench.host, bench.vm
    gmem = bench.gmem()
    files = host.process.fds
    assert refused(lambda: bench.run(move_enc_context_from(other.kvm, files, 99))) == (errno.EBADF, "fd.not_open")
    assert refused(lambda: bench.run(move_enc_context_from(other.kvm, files, gmem.fd))) == (
        errno.EBADF,
        "enc_context.not_vm",
    )
    assert refused(lambda: vm.move_enc_context_from(vm)) == (errno.EINVAL, "enc_context.same_vm")
    plain, second = host.create_vm(VmType.DEFAULT), host.create_vm(VmType.DEFAULT)
    assert refused(lambda: plain.move_enc_context_from(vm)) == (errno.EINVAL, "move.type")
    assert refused(lambda: plain.move_enc_context_from(second)) == (errno.EINVAL, "move.source")
    used = host.create_vm(VmType.SW_PROTECTED)
    used.create_guest_memfd(K)
    assert refused(lambda: used.move_enc_context_from(vm)) == (errno.EINVAL, "move.destination")
    used.kvm.migration_in_progress = True
    assert refused(lambda: used.move_enc_context_from(vm)) == (errno.EBUSY, "enc_context.busy")
    used.kvm.migration_in_progress = False
    other.copy_enc_context_from(vm)
    fresh = host.create_vm(VmType.SW_PROTECTED)
    assert refused(lambda: fresh.move_enc_context_from(vm)) == (errno.EBUSY, "move.mirrors")
    assert loads(bench, vm, Store(0, 1), Load(0)) == [1], "the source goes on"
    assert not vm.kvm.migration_in_progress
    assert vm.kvm.references.value == 3, "its descriptor, its file, its helper"


def test_a_vcpu_that_is_half_made_keeps_the_identity_where_it_is(bench: Bench, other: Vm) -> None:
    """B43, for either side; the interleavings are those of scenario migration_against_vcpu_creation."""
    for vm in (bench.vm, other):
        vm.kvm.created_vcpus += 1
        assert refused(lambda: other.move_enc_context_from(bench.vm)) == (errno.EBUSY, "move.vcpu_creation")
        vm.kvm.created_vcpus -= 1
    other.move_enc_context_from(bench.vm)


def test_a_creation_that_fails_is_counted_no_more(bench: Bench, other: Vm) -> None:
    bench.vcpu()
    assert refused(lambda: bench.vm.create_vcpu(0)) == (errno.EEXIST, "vcpu.exists")
    assert bench.vm.kvm.created_vcpus == 1
    other.move_enc_context_from(bench.vm)


def test_a_helper_has_the_identity_and_holds_the_owner(bench: Bench, other: Vm) -> None:
    """R24, R25: the owner's descriptor may go first, the owner may not."""
    gmem = bench.gmem(init_shared=False, mmap=False)
    loads(bench, bench.vm, Store(0, 5))
    other.copy_enc_context_from(bench.vm)
    linked = linked_and_bound(bench, gmem, other)
    bench.vm.close()
    gmem.close()
    assert not bench.vm.kvm.destroyed
    assert loads(bench, other, Load(0)) == [5]
    linked.close()
    other.close()
    assert other.kvm.destroyed
    assert bench.vm.kvm.destroyed


def test_who_may_be_a_helper_of_whom(bench: Bench, other: Vm) -> None:
    host = bench.host
    other.copy_enc_context_from(bench.vm)
    fresh = host.create_vm(VmType.SW_PROTECTED)
    assert refused(lambda: fresh.copy_enc_context_from(other)) == (errno.EINVAL, "copy.source")
    assert refused(lambda: other.copy_enc_context_from(bench.vm)) == (errno.EINVAL, "copy.destination")
    bench.vcpu(vm=fresh)
    assert refused(lambda: fresh.copy_enc_context_from(bench.vm)) == (errno.EINVAL, "copy.destination")
    assert refused(lambda: fresh.copy_enc_context_from(host.create_vm())) == (errno.EINVAL, "copy.source")
    assert bench.vm.kvm.mirrors == [other.kvm]


def test_a_helper_may_migrate_and_the_owner_when_it_has_none(bench: Bench, other: Vm) -> None:
    """782006c4166e: who has the identity as a helper hands that on, too."""
    other.copy_enc_context_from(bench.vm)
    elsewhere, fresh = (bench.host.create_vm(VmType.SW_PROTECTED) for _ in range(2))
    elsewhere.move_enc_context_from(other)
    assert bench.vm.kvm.mirrors == [elsewhere.kvm]
    assert other.kvm.mirror_of is None
    assert refused(lambda: fresh.move_enc_context_from(bench.vm)) == (errno.EBUSY, "move.mirrors")
    elsewhere.close()
    fresh.move_enc_context_from(bench.vm)
    assert refused(lambda: other.copy_enc_context_from(fresh)) == (errno.EIO, "ioctl.vm_dead")


def test_a_migration_waits_for_a_running_vcpu_and_a_kill_ends_the_wait(bench: Bench, other: Vm) -> None:
    mutex, scheduler = bench.vcpu().vcpu.mutex, bench.host.scheduler
    stays = True

    async def run() -> None:
        async with mutex:
            await park(Operation("run", "guest", lambda: not stays))

    def migrate() -> Task[None]:
        task = scheduler.spawn(move_enc_context_from(other.kvm, bench.host.process.fds, bench.vm.fd), "move")
        while scheduler.step():
            pass
        return task

    scheduler.spawn(run(), "guest")
    killed = migrate()
    assert not killed.done
    killed.signal_pending = True
    while scheduler.step():
        pass
    assert refused(killed.outcome) == (errno.EINTR, "enc_context.killed")
    waits = migrate()
    assert not waits.done
    stays = False
    while scheduler.step():
        pass
    assert waits.outcome() is None
    assert bench.vm.kvm.dead


def test_a_thousand_migrations_leave_nothing() -> None:
    """L3, counted: descriptors, tasks, pages, struct kvm, inodes, identities, notifiers."""
    bench = Bench(pages=64)
    host = bench.host
    source, gmem = bench.vm, bench.gmem(2)
    loads(bench, source, Store(0, 77))
    for _ in range(1000):
        destination = host.create_vm(VmType.SW_PROTECTED)
        helper = host.create_vm(VmType.SW_PROTECTED)
        linked = linked_and_bound(bench, gmem, destination)
        destination.move_enc_context_from(source)
        helper.copy_enc_context_from(destination)
        seen = helper.link_guest_memfd(linked)
        for each in (gmem, source, seen, helper):
            each.close()
        source, gmem = destination, linked
        host.vms[:-2] = []
    assert loads(bench, source, Load(0)) == [77]
    assert len(host.identities.live) == 1
    assert host.pool.statistics().allocated == 1
    assert sorted(host.process.fds.open_fds()) == sorted({source.fd, gmem.fd})
    assert host.process.mm.notifiers == [source.kvm]
    source.close()
    gmem.close()
    assert not host.process.fds.open_fds()
    assert not [task for task in host.scheduler.parked if not task.done]
    bench.close()
