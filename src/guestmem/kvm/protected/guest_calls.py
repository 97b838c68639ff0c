"""How the guests of each type of VM call KVM besides VMCALL: an object for each vCPU that answers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from guestmem.kvm.exits import Exit
from guestmem.kvm.protected.ghcb import Ghcb
from guestmem.kvm.protected.tdcall import Tdcalls
from guestmem.uapi.kvm import VmType

if TYPE_CHECKING:
    from guestmem.kvm.vcpu import Vcpu


class GuestCalls(Protocol):
    """Of one vCPU. `handles` is the stop that it takes. An exit of the two that is a HypercallExit is forwarded:
    `complete` is called with what userspace answered."""

    handles: ClassVar[type]

    async def handle(self, stop: Any) -> Exit | None:
        """The exit for a stop; None to go on in the guest."""
        ...

    async def complete(self, ret: int) -> Exit | None:
        """As handle, for what userspace made of the last exit."""
        ...


GUEST_CALLS: dict[VmType, Callable[[Vcpu], GuestCalls]] = {VmType.SNP: Ghcb, VmType.TDX: Tdcalls}
