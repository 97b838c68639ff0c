"""KVM_SET_MEMORY_ATTRIBUTES: private or shared by guest frame, kept by the VM. What kernels before in-place have.

Nothing in the file changes: a private frame comes from the file, a shared one from the slot's host address, and the
bytes of the side that is not used stay there until the VMM punches them.

Source: virt/kvm/kvm_main.c kvm_vm_set_mem_attributes; spec/uapi.md section 10.
"""

from __future__ import annotations

import errno

from guestmem.kvm.addresses import Gfn
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, Range
from guestmem.memory.attributes import other
from guestmem.trace import Refusal
from guestmem.trace import events as event
from guestmem.uapi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE
from guestmem.uapi.structs import MemoryAttributes

_U64 = 1 << 64


async def set_memory_attributes(kvm: Kvm, alleged: MemoryAttributes) -> None:
    """Give the frames of a range their attributes. No memslot needs to exist there.

    Raises: Refusal EINVAL `attributes.flags`, `attributes.attributes`, `attributes.range`, `attributes.unaligned`;
    ENOMEM `attributes.nomem`. In this order.
    """
    supported = kvm.supported_vm_attributes
    address, size = alleged.address, alleged.size
    if alleged.flags:
        raise Refusal(errno.EINVAL, "attributes.flags", flags=alleged.flags)
    if alleged.attributes & ~supported:
        raise Refusal(errno.EINVAL, "attributes.attributes", attributes=alleged.attributes, supported=supported)
    if not size or address + size >= _U64:
        raise Refusal(errno.EINVAL, "attributes.range", address=address, size=size)
    if (address | size) & (PAGE_SIZE - 1):
        raise Refusal(errno.EINVAL, "attributes.unaligned", address=address, size=size)
    gfns = Range(Gfn(address >> PAGE_SHIFT), Gfn((address + size) >> PAGE_SHIFT))
    private = alleged.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE
    await _set(kvm, gfns, Access.PRIVATE if private else Access.SHARED)


async def _set(kvm: Kvm, gfns: Range[Gfn], to: Access) -> None:
    async with kvm.slots_lock:
        if kvm.attributes.is_all(gfns, to):
            return
        if kvm.scheduler.fails("attributes: reserve"):
            raise Refusal(errno.ENOMEM, "attributes.nomem", gfn=gfns.start, pages=gfns.pages)
        parts = [part for slot in kvm.memslots.overlapping(gfns) if (part := slot.gfns.intersection(gfns))]
        if parts:
            await kvm.stage2.begin(parts, (other(to),))
        kvm.attributes.set(gfns, to)
        if kvm.tracer.enabled:
            kvm.tracer.emit(event.KvmSetAttributes(kvm.number, gfns.start, gfns.end, _bits(to)))
        if parts:
            await kvm.stage2.end()


def _bits(access: Access) -> int:
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if access is Access.PRIVATE else 0
