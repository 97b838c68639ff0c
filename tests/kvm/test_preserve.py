"""Preserve, record, restore: what a frozen file refuses, what a record says, and that another host has it as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import msgspec
import pytest

from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Vm
from guestmem.kvm import preserve
from guestmem.kvm.exits import HltExit
from guestmem.kvm.identity import Identity, IdentityPool, VirtualMachine
from guestmem.kvm.preserve import GmemRecord, VmRecord
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SIZE, Access, MemfdBacking, PageIndex
from guestmem.trace import EHWPOISON, Refusal
from guestmem.uapi.kvm import VmType
from tests.kvm.conftest import Bench

K = PAGE_SIZE


def refused(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno, caught.value.rule


def freeze(bench: Bench, gmem: Gmem) -> None:
    bench.run(preserve.preserve_gmem(gmem.file))


def test_a_frozen_file_gives_what_it_has_and_changes_no_more(bench: Bench) -> None:
    gmem = bench.gmem()
    view = gmem.mmap()
    view[0] = 1
    freeze(bench, gmem)
    assert view[0] == 1
    assert refused(lambda: gmem.allocate(0, K)) == (errno.EPERM, "frozen.fallocate")
    assert refused(lambda: gmem.punch_hole(0, K)) == (errno.EPERM, "frozen.fallocate")
    assert refused(lambda: gmem.convert(0, K, Access.PRIVATE)) == (errno.EPERM, "frozen.convert")
    assert refused(lambda: bench.vm.pre_fault(K, K)) == (errno.EPERM, "frozen.fault")
    assert refused(lambda: bench.guest(Store(K, 1))) == (errno.EPERM, "frozen.fault")
    gmem.convert(0, K, Access.SHARED)  # it is shared already: nothing would change
    bench.run(preserve.unpreserve_gmem(gmem.file))
    gmem.punch_hole(0, K)
    assert bench.guest(Store(K, 1))[0] == HltExit()


def test_what_cannot_be_preserved(bench: Bench) -> None:
    gmem, other = bench.gmem(), bench.host.create_vm(VmType.SW_PROTECTED)
    linked = other.link_guest_memfd(gmem)
    assert refused(lambda: freeze(bench, linked)) == (errno.EINVAL, "preserve.owner")
    gmem.allocate(0, K)
    freeze(bench, gmem)
    assert refused(lambda: freeze(bench, gmem)) == (errno.EBUSY, "preserve.twice")
    bench.run(preserve.unpreserve_gmem(gmem.file))
    bench.run(gmem.inode.memory_failure(PageIndex(0)))
    assert refused(lambda: freeze(bench, gmem)) == (EHWPOISON, "preserve.poisoned")
    gmem.punch_hole(0, K)
    helper = bench.host.create_vm(VmType.SW_PROTECTED)
    helper.copy_enc_context_from(bench.vm)
    assert refused(lambda: preserve.preserve_vm(helper.kvm)) == (errno.EOPNOTSUPP, "preserve.helper")
    bench.run(bench.host.scheduler.preempt("nothing"))


def test_a_preserved_vm_keeps_its_identity(bench: Bench) -> None:
    other = bench.host.create_vm(VmType.SW_PROTECTED)
    preserve.preserve_vm(bench.vm.kvm)
    assert refused(lambda: preserve.preserve_vm(bench.vm.kvm)) == (errno.EBUSY, "preserve.twice")
    assert refused(lambda: other.move_enc_context_from(bench.vm)) == (errno.EBUSY, "enc_context.preserved")
    assert refused(lambda: other.copy_enc_context_from(bench.vm)) == (errno.EBUSY, "enc_context.preserved")
    preserve.unpreserve_vm(bench.vm.kvm)
    other.move_enc_context_from(bench.vm)
    assert refused(lambda: preserve.preserve_vm(bench.vm.kvm)) == (errno.EIO, "ioctl.vm_dead")


def test_another_host_has_memory_state_and_identity_as_they_were(bench: Bench) -> None:
    """Also when the first host is no more: the record and the memfd are all that is needed."""
    gmem = bench.gmem(8)
    gmem.convert(2 * K, 3 * K, Access.PRIVATE)
    bench.guest(Store(0, 1), Store(3 * K, 2))
    preserve.preserve_vm(bench.vm.kvm)
    freeze(bench, gmem)
    vm_record, record = preserve.record_vm(bench.vm.kvm), preserve.record_gmem(gmem.file)
    assert isinstance(gmem.inode.backing, MemfdBacking)
    memfd = os.dup(gmem.inode.backing.fd)
    assert record.converted == [(2, 5)]
    assert msgspec.json.decode(msgspec.json.encode(record), type=GmemRecord) == record
    assert msgspec.json.decode(msgspec.json.encode(vm_record), type=VmRecord) == vm_record

    after = Bench()
    host = after.host
    after.vm.close()
    host.identities.adopt(vm_record.identity)
    machine = VirtualMachine(
        host.scheduler, host.identities, host.platforms[VmType.DEFAULT], identity=vm_record.identity
    )
    kvm = Kvm(host.environment, len(host.vms), VmType(vm_record.vm_type), host.level, host.process.mm, machine)
    host.vms.append(kvm)
    vm = Vm(host, kvm, host.process.fds.reserve())
    host.process.fds.install(vm.fd, kvm)
    abilities = preserve.abilities_of(record)
    inode = host.new_inode(size=record.size, abilities=abilities, owner=kvm.machine, memfd=memfd)
    file = after.run(preserve.restore_gmem(kvm, inode, record))
    fd = host.process.fds.reserve()
    host.process.fds.install(fd, file)
    restored = Gmem(host, file, fd)
    assert restored.accesses() == gmem.accesses()
    assert list(inode.folios.present) == [0, 3]
    vm.set_memory_region(0, 0, record.size, gmem=restored)
    vcpu = after.vcpu(Load(0), Load(3 * K), Load(4 * K), vm=vm)
    assert vcpu.run() == HltExit()
    assert isinstance(vcpu.engine, ScriptedEngine)
    assert vcpu.engine.loaded == [1, 2, 0]
    assert host.create_vm(VmType.SW_PROTECTED).kvm.machine.identity.generation > vm_record.generation
    after.close()


def test_an_adopted_identity_is_taken_and_later_ones_are_others() -> None:
    pool = IdentityPool(count=5)
    pool.adopt(Identity(3, 40))
    assert refused(lambda: pool.adopt(Identity(3, 41))) == (errno.EBUSY, "identity.taken")
    assert refused(lambda: pool.adopt(Identity(6, 41))) == (errno.EBUSY, "identity.taken")
    numbers = [pool.allocate() for _ in range(4)]
    assert sorted(identity.number for identity in numbers) == [1, 2, 4, 5]
    assert min(identity.generation for identity in numbers) > 40
    with pytest.raises(Refusal):
        pool.allocate()
    pool.free(Identity(3, 40))
    assert pool.allocate().number == 3
