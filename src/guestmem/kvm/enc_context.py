"""Who has a virtual machine's identity: it is moved to another struct kvm, or shared with a helper.

    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM   intra-host migration: the destination is the virtual machine now, the source dead
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM   a helper (mirror) runs under the owner's identity, and holds the owner

The two are the only ways in which a struct kvm comes by an identity that it was not born with, and both need the
source's VM descriptor: no call sets an identity from data (known bug B40). Memory does not take part: it belongs to the
identity, and views that were linked before show it from the moment in which the identity is here (`context`).

A move excludes whatever reads the identity: it holds both kvm->lock, every vcpu->mutex and both slots_lock, so no vCPU
runs or is put online, nothing is populated and no memslot changes (S18). What may fail comes before; a refused move
leaves the source running.

Source: arch/x86/kvm/svm/sev.c sev_lock_two_vms, sev_vm_move_enc_context_from, sev_vm_copy_enc_context_from;
17d44a96f000 (no migration of a VM that has mirrors), 782006c4166e (a mirror may migrate), ecf371f8b02d (vCPU creation
in flight).
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

from guestmem.kvm.addresses import Gfn
from guestmem.kvm.vm import Kvm
from guestmem.memory import Range
from guestmem.memory.notifier import BOTH
from guestmem.sched import AllOf, Lock
from guestmem.trace import Refusal
from guestmem.trace import events as event


class OpenFiles(Protocol):
    """The caller's descriptors."""

    def get(self, fd: int) -> object:
        """Raises: Refusal EBADF."""
        ...


async def move_enc_context_from(kvm: Kvm, files: OpenFiles, source_fd: int) -> None:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: `kvm` takes the identity of another VM, which is dead afterwards.

    Its views of the memory stop mapping and those of `kvm` may; slots of `kvm` are best bound before.

    Raises: Refusal EBADF `enc_context.not_vm`; EINVAL `enc_context.same_vm`; EBUSY `enc_context.busy`,
    `enc_context.preserved`; EINTR `enc_context.killed`; EINVAL `move.type`, `move.source`, `move.destination`;
    EBUSY `move.mirrors`, `move.vcpu_creation`. In this order.
    """
    kvm.check_alive()
    source = _get_vm(files, source_fd)
    try:
        async with _both_locked(kvm, source):
            _check_movable(kvm, source)
            async with AsyncExitStack() as stack:
                if mutexes := [vcpu.mutex for each in (kvm, source) for vcpu in each.vcpus.values()]:
                    await stack.enter_async_context(_all_of(kvm, mutexes, "every vcpu->mutex"))
                _check_no_vcpu_in_flight(kvm, source)
                await stack.enter_async_context(_all_of(kvm, [kvm.slots_lock, source.slots_lock], "both slots_lock"))
                await _move(kvm, source)
    finally:
        await source.put()


def _check_movable(kvm: Kvm, source: Kvm) -> None:
    """Helpers count on the source to keep the identity alive, so they must be gone first."""
    if kvm.vm_type is not source.vm_type:
        raise Refusal(errno.EINVAL, "move.type", vm_type=kvm.vm_type.name, source_type=source.vm_type.name)
    if not source.has_private_memory or source.dead:
        raise Refusal(errno.EINVAL, "move.source", vm=source.number, dead=source.dead)
    if kvm.identity_in_use:
        raise Refusal(errno.EINVAL, "move.destination", vm=kvm.number)
    if source.mirrors:
        raise Refusal(errno.EBUSY, "move.mirrors", vm=source.number, mirrors=len(source.mirrors))


async def _move(kvm: Kvm, source: Kvm) -> None:
    """The point of no return: nothing in here may fail.

    The identity changes hands while the source's mmu_lock is held and its sequence moves, so that a page that was
    looked up under it before is not installed afterwards.
    """
    source.dead = True
    if source.stage2.remote is not None:
        source.stage2.remote.review()
    async with source.stage2.mmu_lock:
        source.stage2.window.sequence.bump()
        source.stage2.zap(Range(Gfn(0), Gfn(source.attributes.count)), BOTH)
        await source.stage2.flush_remote()
        source.kick_vcpus()
        kvm.machine, source.machine = source.machine, kvm.machine
        for each in (kvm, source):
            for vcpu in each.vcpus.values():
                vcpu.identity = each.machine.identity
        for number in kvm.vcpus.keys() & source.vcpus.keys():
            to, origin = kvm.vcpus[number].guest_mode, source.vcpus[number].guest_mode
            if to is not None and origin is not None:
                to.take_over(origin)
        if source.mirror_of is not None:
            owner, source.mirror_of = source.mirror_of, None
            kvm.mirror_of = owner
            kvm.helper_number, source.helper_number = source.helper_number, 0
            owner.mirrors[owner.mirrors.index(source)] = kvm
        if kvm.tracer.enabled:
            kvm.tracer.emit(event.KvmMoveEncContext(kvm.number, source.number, *kvm.machine.identity))


async def copy_enc_context_from(kvm: Kvm, files: OpenFiles, source_fd: int) -> None:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: `kvm` becomes a helper of another VM and runs under its identity.

    It holds the owner, so it cannot outlive it (R25): closing the owner's descriptor ends the owner after the helper.
    The helper may be of another type than the owner: then it has the identity, and its own rule about private memory.

    Raises: Refusal EBADF `enc_context.not_vm`; EINVAL `enc_context.same_vm`; EBUSY `enc_context.busy`,
    `enc_context.preserved`; EINTR `enc_context.killed`; EINVAL `copy.source`, `copy.destination`.
    """
    kvm.check_alive()
    source = _get_vm(files, source_fd)
    try:
        async with _both_locked(kvm, source):
            if not source.has_private_memory or source.dead or source.mirror_of is not None:
                raise Refusal(errno.EINVAL, "copy.source", vm=source.number, mirror=source.mirror_of is not None)
            if kvm.identity_in_use or kvm.created_vcpus:
                raise Refusal(errno.EINVAL, "copy.destination", vm=kvm.number, vcpus=kvm.created_vcpus)
            source.get()
            kvm.mirror_of = source
            source.mirrors.append(kvm)
            source.machine.helpers += 1
            kvm.helper_number = source.machine.helpers
            unused, kvm.machine = kvm.machine, source.machine
            kvm.machine.get()
            unused.put()
            if kvm.tracer.enabled:
                kvm.tracer.emit(event.KvmCopyEncContext(kvm.number, source.number, *kvm.machine.identity))
    finally:
        await source.put()


def _get_vm(files: OpenFiles, fd: int) -> Kvm:
    """A reference to the VM behind a descriptor, which any process may have been given."""
    file = files.get(fd)
    if not isinstance(file, Kvm):
        raise Refusal(errno.EBADF, "enc_context.not_vm", fd=fd)
    file.get()
    return file


@asynccontextmanager
async def _both_locked(kvm: Kvm, source: Kvm) -> AsyncIterator[None]:
    """Both kvm->lock, and nobody else may begin the same with either. Source: sev_lock_two_vms."""
    if kvm is source:
        raise Refusal(errno.EINVAL, "enc_context.same_vm", vm=kvm.number)
    if kvm.migration_in_progress or source.migration_in_progress:
        raise Refusal(errno.EBUSY, "enc_context.busy", vm=kvm.number, source=source.number)
    if kvm.preserved or source.preserved:
        raise Refusal(errno.EBUSY, "enc_context.preserved", vm=kvm.number, source=source.number)
    kvm.migration_in_progress = source.migration_in_progress = True
    try:
        async with _all_of(kvm, [kvm.lock, source.lock], "both kvm->lock"):
            yield
    finally:
        kvm.migration_in_progress = source.migration_in_progress = False


def _all_of(kvm: Kvm, locks: list[Lock], what: str) -> AllOf:
    name = f"{what} vm {kvm.number}"
    return AllOf(kvm.scheduler, locks, name, on_kill=Refusal(errno.EINTR, "enc_context.killed", vm=kvm.number))


def _check_no_vcpu_in_flight(kvm: Kvm, source: Kvm) -> None:
    """A vCPU that is being made has read the identity already and will be put online with it (known bug B43)."""
    for each in (kvm, source):
        if each.created_vcpus != len(each.vcpus):
            raise Refusal(
                errno.EBUSY, "move.vcpu_creation", vm=each.number, created=each.created_vcpus, online=len(each.vcpus)
            )
