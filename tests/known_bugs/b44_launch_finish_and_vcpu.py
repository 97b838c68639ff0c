"""B44, cb923ee6a80f: the launch ends while a vCPU whose state it reads is loaded."""

from contextlib import AbstractAsyncContextManager, nullcontext

from guestmem.check.mutants import mutant
from guestmem.kvm.vm import Kvm


@mutant("B44", replaces="guestmem.kvm.protected.launch:all_vcpus", breaks={"S18"})
def launch_finish_and_vcpu(kvm: Kvm) -> AbstractAsyncContextManager[None]:
    """The vCPUs are not locked."""
    return nullcontext()
