"""What actors of a scenario do with views and identities: link, migrate, be a helper."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from guestmem.host import Gmem, Vm
from guestmem.kvm import vcpu
from guestmem.kvm.enc_context import copy_enc_context_from, move_enc_context_from
from guestmem.kvm.link import link_guest_memfd
from guestmem.kvm.set_region import set_user_memory_region2
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD
from guestmem.uapi.structs import LinkGuestMemfd, UserspaceMemoryRegion2

if TYPE_CHECKING:
    from guestmem.check.machine import Machine

Call = Coroutine[Any, Any, object]


def second_view(m: Machine, gmem: Gmem, gpa: int = 0) -> Vm:
    """A helper of the first VM with a view of its own of the inode, bound as its slot 0 at `gpa`. The view lives as
    long as its descriptor."""
    vm = m.create_vm(m.vm().kvm.vm_type)
    vm.copy_enc_context_from(m.vm())
    vm.set_memory_region(0, gpa, gmem.inode.size, gmem=vm.link_guest_memfd(gmem))
    return vm


def link(m: Machine, gmem: Gmem, vm: Vm, *, slot: int | None = None, gpa: int = 0) -> Call:
    """KVM_LINK_GUEST_MEMFD by number; with `slot` the new file is bound there next."""

    async def call() -> None:
        fd = await link_guest_memfd(vm.kvm, m.process.fds, LinkGuestMemfd(gmem.fd))
        if slot is not None:
            region = UserspaceMemoryRegion2(slot, KVM_MEM_GUEST_MEMFD, gpa, gmem.inode.size, guest_memfd=fd)
            await set_user_memory_region2(vm.kvm, m.process.fds, region)

    return m.atomic(call()) if slot is None else call()


def move(m: Machine, source: Vm, to: Vm) -> Call:
    """KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM."""
    return m.atomic(move_enc_context_from(to.kvm, m.process.fds, source.fd))


def copy(m: Machine, source: Vm, to: Vm) -> Call:
    """KVM_CAP_VM_COPY_ENC_CONTEXT_FROM."""
    return m.atomic(copy_enc_context_from(to.kvm, m.process.fds, source.fd))


def create_vcpu(m: Machine, vm: Vm, number: int = 0) -> Call:
    """KVM_CREATE_VCPU, of one that never runs."""

    async def create() -> None:
        created = await vcpu.create_vcpu(vm.kvm, number)
        m.process.fds.install(m.process.fds.reserve(), created)

    return create()
