"""KVM_LINK_GUEST_MEMFD: every refusal in the posted order, whose view may be made, and what a view has of its own."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Host, Vm
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.kvm.ioctl import ioctl
from guestmem.kvm.link import link_guest_memfd
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import LinkGuestMemfd
from tests.kvm.conftest import Bench

K = PAGE_SIZE


def refused(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno, caught.value.rule


def link(bench: Bench, vm: Vm, fd: int, flags: int = 0, reserved: int = 0) -> int:
    return bench.run(link_guest_memfd(vm.kvm, bench.host.process.fds, LinkGuestMemfd(fd, flags, (reserved,) * 6)))


@pytest.fixture
def other(bench: Bench) -> Vm:
    return bench.host.create_vm(VmType.SW_PROTECTED)


def test_each_bad_argument_has_its_errno_and_the_first_one_counts(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem()
    fds = bench.host.process.fds
    before = fds.open_fds()
    assert refused(lambda: link(bench, bench.vm, 99, flags=1)) == (errno.EINVAL, "link.flags")
    assert refused(lambda: link(bench, other, 99)) == (errno.EINVAL, "link.not_open")
    assert refused(lambda: link(bench, other, other.fd)) == (errno.EINVAL, "link.not_gmem")
    assert refused(lambda: link(bench, bench.vm, gmem.fd)) == (errno.EINVAL, "link.same_vm")
    fds.limit = len(before)
    assert refused(lambda: link(bench, other, gmem.fd)) == (errno.EMFILE, "fd.limit")
    assert fds.open_fds() == before
    assert gmem.file.references.value == gmem.inode.references.value == 1


def test_reserved_words_and_the_upper_half_of_the_descriptor_are_not_looked_at(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem()
    assert link(bench, other, gmem.fd | 7 << 32, reserved=5) not in (gmem.fd, other.fd)


def test_without_memory_nothing_is_left(bench: Bench, other: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    gmem = bench.gmem()
    before = bench.host.process.fds.open_fds()
    monkeypatch.setattr(bench.host.scheduler, "fails", lambda what: what.startswith("link"))
    assert refused(lambda: other.link_guest_memfd(gmem)) == (errno.ENOMEM, "link.nomem")
    assert bench.host.process.fds.open_fds() == before
    assert gmem.inode.references.value == 1


def test_a_file_is_linked_on_the_same_inode_and_has_bindings_of_its_own(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem()
    linked = other.link_guest_memfd(gmem)
    assert linked.inode is gmem.inode
    assert linked.file is not gmem.file
    assert linked.bound_to(other)
    assert refused(lambda: other.set_memory_region(0, 0, K, gmem=gmem)) == (errno.EINVAL, "bind.other_vm")
    other.set_memory_region(0, 16 * K, 4 * K, gmem=linked, offset=4 * K)
    other.set_memory_region(0, 0, 0)
    assert bench.vm.kvm.memslots.by_gfn[0].context is gmem.file.private_data


def test_a_stranger_may_not_link(bench: Bench, other: Vm) -> None:
    """R20, R26: a VM in whose name there is memory is another virtual machine for good."""
    gmem = bench.gmem()
    own = other.create_guest_memfd(K)
    assert refused(lambda: other.link_guest_memfd(gmem)) == (errno.EINVAL, "link.identity")
    own.close()
    other.link_guest_memfd(gmem)


def test_a_vm_that_has_run_is_a_stranger(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem()
    other.set_memory_region(0, 0, K, memory=bench.host.anonymous(K))
    assert bench.vcpu(Load(0), vm=other).run() == HltExit()
    assert refused(lambda: other.link_guest_memfd(gmem)) == (errno.EINVAL, "link.identity")


def test_a_vm_of_the_other_kind_is_a_stranger(bench: Bench) -> None:
    """It could never take the identity over."""
    plain = bench.host.create_vm(VmType.DEFAULT)
    assert refused(lambda: plain.link_guest_memfd(bench.gmem())) == (errno.EINVAL, "link.identity")


def test_a_view_before_the_identity_comes_shows_the_host_everything_and_the_guest_nothing(
    bench: Bench, other: Vm
) -> None:
    gmem = bench.gmem()
    linked = other.link_guest_memfd(gmem)
    other.set_memory_region(0, 0, 8 * K, gmem=linked)
    gmem.mmap()[0] = 7
    assert linked.mmap()[0] == 7
    exit_ = bench.vcpu(Load(0), vm=other).run()
    assert isinstance(exit_, MemoryFaultExit)
    assert exit_.refusal.rule == "fault.identity"
    assert refused(lambda: linked.convert(0, K, Access.PRIVATE)) == (errno.EINVAL, "attributes2.owner")


def test_memory_outlives_the_first_struct_kvm_and_not_the_virtual_machine(bench: Bench, other: Vm) -> None:
    """R22, R23."""
    gmem = bench.gmem()
    gmem.convert(0, K, Access.PRIVATE)
    vcpu = bench.vcpu(Store(0, 9))
    vcpu.run()
    vcpu.close()
    identity = bench.vm.kvm.machine.identity
    linked = other.link_guest_memfd(gmem)
    other.set_memory_region(0, 0, 8 * K, gmem=linked)
    bench.vm.close()
    gmem.close()
    assert bench.vm.kvm.destroyed
    assert not linked.inode.destroyed
    assert bench.host.identities.live[identity.number] == identity, "the memory keeps it"
    linked.close()
    assert linked.inode.destroyed
    assert identity not in bench.host.identities.live.values()


def test_conversion_through_any_view_tells_every_context(bench: Bench) -> None:
    helper = bench.host.create_vm(VmType.SW_PROTECTED)
    helper.copy_enc_context_from(bench.vm)
    gmem = bench.gmem()
    linked = helper.link_guest_memfd(gmem)
    helper.set_memory_region(0, 0, 8 * K, gmem=linked)
    assert bench.guest(Store(0, 1))[0] == HltExit()
    assert bench.vcpu(Store(0, 2), vm=helper).run() == HltExit()
    linked.convert(0, K, Access.PRIVATE)
    for vm in (bench.vm, helper):
        assert vm.kvm.stage2.lookup(0) is None  # type: ignore[arg-type]
    assert bench.guest(Load(0)) == (HltExit(), [2])


def test_each_vms_rule_about_private_memory_is_its_own(bench: Bench) -> None:
    """A helper without private memory shares the identity, may not convert, and reaches what is shared."""
    helper = bench.host.create_vm(VmType.DEFAULT)
    helper.copy_enc_context_from(bench.vm)
    gmem = bench.gmem()
    linked = helper.link_guest_memfd(gmem)
    helper.set_memory_region(0, 0, 8 * K, gmem=linked)
    assert refused(lambda: linked.convert(0, K, Access.PRIVATE)) == (errno.EINVAL, "attributes2.no_private_memory")
    gmem.convert(0, K, Access.PRIVATE)
    exit_ = bench.vcpu(Load(0), vm=helper).run()
    assert isinstance(exit_, MemoryFaultExit)
    assert exit_.refusal.rule == "fault.mismatch"
    assert bench.vcpu(Load(K), number=1, vm=helper).run() == HltExit()


def test_vms_without_private_memory_become_one_by_linking() -> None:
    """A VMM that starts again gets its memory back: nothing but the descriptor is needed."""
    bench = Bench(VmType.DEFAULT)
    gmem = bench.gmem()
    bench.guest(Store(K, 3))
    again = bench.host.create_vm(VmType.DEFAULT)
    linked = again.link_guest_memfd(gmem)
    assert again.kvm.machine is bench.vm.kvm.machine
    again.set_memory_region(0, 0, 8 * K, gmem=linked)
    bench.vm.close()
    gmem.close()
    vcpu = bench.vcpu(Load(K), vm=again)
    assert vcpu.run() == HltExit()
    assert isinstance(vcpu.engine, ScriptedEngine)
    assert vcpu.engine.loaded == [3]
    stranger = bench.host.create_vm(VmType.DEFAULT)
    stranger.create_guest_memfd(K)
    assert refused(lambda: stranger.link_guest_memfd(linked)) == (errno.EINVAL, "link.identity")
    bench.close()


def test_the_ioctl_is_there_from_its_level_on() -> None:
    for level in LEVELS.values():
        with Host(level=level) as host:
            vm = host.create_vm(VmType.SW_PROTECTED)
            expected = errno.EFAULT if level.link else errno.ENOTTY
            call = ioctl(host.process, vm.fd, uapi.KVM_LINK_GUEST_MEMFD, 0)
            assert refused(lambda host=host, call=call: host.run(call))[0] == expected  # type: ignore[misc]


def test_the_ioctl_reads_its_argument_and_returns_a_descriptor(bench: Bench, other: Vm) -> None:
    gmem = bench.gmem()
    argument = bench.host.anonymous(K)
    argument[0:64] = LinkGuestMemfd(gmem.fd).pack()
    fd = bench.run(ioctl(bench.host.process, other.fd, uapi.KVM_LINK_GUEST_MEMFD, argument.hva))
    assert fd == max(bench.host.process.fds.open_fds())
