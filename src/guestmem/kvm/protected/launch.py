"""Launch: a protected virtual machine's first bytes, and what firmware says that they are.

    launch_start -> launch_update (populate, page by page) -> launch_finish -> vCPUs may run

What SNP_LAUNCH_START, _UPDATE and _FINISH share with TDX's INIT_VM, INIT_MEM_REGION and FINALIZE_VM. The end of it
reads the state of every vCPU, so none may run, be set or be half made meanwhile (S18).

Source: arch/x86/kvm/svm/sev.c snp_launch_start, snp_launch_update, snp_launch_finish, snp_launch_update_vmsa;
cb923ee6a80f (all vCPUs are locked), af44c79b31e4 (no vCPU in creation).
"""

from __future__ import annotations

import dataclasses
import errno
import struct
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from guestmem.arch import Block, FirmwareError
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.populate import populate
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm import Kvm, PinnedPage
from guestmem.memory import PAGE_SIZE, Page
from guestmem.sched import AllOf
from guestmem.trace import Refusal

_REGISTERS = struct.Struct("<18Q")  # struct kvm_regs


async def launch_start(kvm: Kvm, parameters: Any = None) -> None:
    """The virtual machine gets a context in firmware. `parameters` are the architecture's own, None for its default.

    Raises: Refusal EIO `ioctl.vm_dead`; EINVAL `launch.done`; EIO, or what the architecture has for it, `launch.start`.
    """
    kvm.check_alive()
    async with kvm.lock:
        _check_launching(kvm)
        try:
            kvm.machine.architecture.start(parameters)
        except FirmwareError as error:
            raise Refusal(error.answer, "launch.start", call=error.call, code=error.code) from error


async def launch_update(kvm: Kvm, gfn: Gfn, source_hva: int | None, pages: int, kind: int = 0) -> int:
    """Add and measure private pages; how many were done. Without a source: the bytes that they have, in place. `kind`
    is the architecture's number of a page type. A source that firmware corrects is written to (SNP's CPUID page).

    Raises: as populate; Refusal EINVAL `launch.done`; EIO `launch.update`, and the page is the host's again.
    """
    kvm.check_alive()
    architecture = kvm.machine.architecture

    async def add(gfn: Gfn, page: Page, source: PinnedPage | None) -> None:
        contents = await source.read(0, PAGE_SIZE) if source is not None else None
        try:
            architecture.populate(gfn, Block(page.pfn, 0, page.hva), contents, kind)
        except FirmwareError as error:
            if error.corrected is not None and source is not None:
                await correct(source, error.corrected)
            if "unmeasured" in error.facts:
                kvm.dead = True  # the page was added: no guest may begin with it (known bug B50)
            raise Refusal(error.answer, "launch.update", gfn=gfn, call=error.call, code=error.code) from error

    async with kvm.lock:
        _check_launching(kvm)
        return await populate(kvm, gfn, source_hva, pages, add, corrects_source=architecture.corrects(kind))


async def launch_finish(kvm: Kvm, parameters: Any = None) -> bytes:
    """The measurement; vCPUs may run from now on. `parameters` as for launch_start.

    Raises: Refusal EIO `ioctl.vm_dead`; EINVAL `launch.done`; EBUSY `launch.vcpu_creation`; EINTR `launch.killed`; EIO,
    or what the architecture has for it, `launch.finish`, nothing changed.
    """
    kvm.check_alive()
    async with kvm.lock:
        _check_launching(kvm)
        for each in (kvm, *kvm.mirrors):
            if each.created_vcpus != len(each.vcpus):
                raise Refusal(errno.EBUSY, "launch.vcpu_creation", created=each.created_vcpus, online=len(each.vcpus))
        async with all_vcpus(kvm):
            kvm.finishing = kvm.scheduler.current
            try:
                states = {vcpu.guest_mode.number: _state(vcpu) for vcpu in _vcpus(kvm) if vcpu.guest_mode is not None}
                await kvm.scheduler.preempt("vCPU state read, launch not finished")
                return kvm.machine.architecture.finalize(states, parameters)
            except FirmwareError as error:
                raise Refusal(error.answer, "launch.finish", call=error.call, code=error.code) from error
            finally:
                kvm.finishing = None


async def correct(source: PinnedPage, contents: bytes) -> None:
    """Tell the VMM what firmware would have: in its own page, which must not be reclaimed as it was (known bug B17)."""
    await source.write(0, contents)
    source.set_dirty()


def all_vcpus(kvm: Kvm) -> AbstractAsyncContextManager[None]:
    """Every vcpu->mutex of the identity: nobody runs a vCPU or sets its registers. Source: kvm_lock_all_vcpus."""
    mutexes = [vcpu.mutex for vcpu in _vcpus(kvm)]
    killed = Refusal(errno.EINTR, "launch.killed", vm=kvm.number)
    if not mutexes:
        return nullcontext()
    return AllOf(kvm.scheduler, mutexes, f"every vcpu->mutex vm {kvm.number}", on_kill=killed)


def _vcpus(kvm: Kvm) -> list[Vcpu]:
    """Those of helpers too, which run under the same identity."""
    return [each.vcpus[number] for each in (kvm, *kvm.mirrors) for number in sorted(each.vcpus)]


def _check_launching(kvm: Kvm) -> None:
    if kvm.machine.architecture.launched:
        raise Refusal(errno.EINVAL, "launch.done", vm=kvm.number)


def _state(vcpu: Vcpu) -> bytes:
    return _REGISTERS.pack(*dataclasses.astuple(vcpu.engine.get_regs()))
