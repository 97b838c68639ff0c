"""vCPUs of protected VMs: in the guest from one slice to the next, out of it at an exit and when they are kicked."""

from __future__ import annotations

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.exits import FailEntryExit, HltExit
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from tests.kvm.conftest import Bench

PROTECTED = [VmType.SNP, VmType.TDX, VmType.ARM_REALM, VmType.ARM_PROTECTED]
TYPES = pytest.mark.parametrize("vm_type", PROTECTED)


def _bench(vm_type: VmType, *script: Load | Store) -> Bench:
    """A launched VM with a page and a vCPU."""
    bench = Bench(vm_type)
    bench.vm.launch.start()
    bench.gmem(1, init_shared=False)
    bench.vcpu(*script)
    bench.vm.launch.finish()
    return bench


@TYPES
def test_inside_between_slices_and_outside_after_an_exit(vm_type: VmType) -> None:
    bench = _bench(vm_type, Store(0, 1), Store(0, 2), Store(0, 3))
    vcpu, architecture = bench.vm.kvm.vcpus[0], bench.vm.kvm.machine.architecture
    seen = []

    async def watch() -> None:
        for _ in range(8):
            seen.append(set(architecture.inside))
            await bench.host.scheduler.cond_resched("watch")

    async def both() -> object:
        watcher = bench.host.scheduler.spawn(watch(), "watch")
        exit_ = await vcpu.run()
        await bench.host.scheduler.join(watcher)
        return exit_

    assert bench.run(both()) == HltExit()
    assert {0} in seen
    assert not architecture.inside
    bench.close()


@TYPES
def test_a_page_is_converted_under_a_vcpu_that_is_inside(vm_type: VmType) -> None:
    bench = _bench(vm_type, Store(0, 1), Load(0), Load(0))
    vcpu, architecture = bench.vm.kvm.vcpus[0], bench.vm.kvm.machine.architecture
    gmem = next(iter(bench.host.inodes))
    kicked = []

    async def convert() -> None:
        for _ in range(20):
            if architecture.inside:
                break
            await bench.host.scheduler.cond_resched("not inside yet")
        assert architecture.inside
        await gmem.fallocate(3, 0, PAGE_SIZE)
        kicked.append(not architecture.inside)

    async def both() -> object:
        converter = bench.host.scheduler.spawn(convert(), "convert")
        exit_ = await vcpu.run()
        await bench.host.scheduler.join(converter)
        return exit_

    assert bench.run(both()) == HltExit()
    assert kicked == [True]
    assert not gmem.unmap_failed
    bench.close()


@pytest.mark.parametrize("vm_type", [VmType.TDX, VmType.ARM_REALM])
def test_a_vcpu_that_firmware_does_not_know(vm_type: VmType) -> None:
    bench = _bench(vm_type)
    with pytest.raises(Refusal, match=r"run\.no_vcpu"):
        bench.vcpu(number=1).run()
    bench.close()


def test_a_helper_has_no_vcpu_that_firmware_knows() -> None:
    bench = _bench(VmType.SNP)
    helper = bench.host.create_vm(VmType.SNP)
    helper.copy_enc_context_from(bench.vm)
    assert bench.vcpu(vm=helper).run() == FailEntryExit("VMRUN", "VMEXIT_INVALID")
    assert bench.vm.kvm.vcpus[0].guest_mode is not None
    assert isinstance(bench.run(bench.vm.kvm.vcpus[0].run()), HltExit)
    bench.close()


def test_a_vcpu_without_vmsa() -> None:
    bench = _bench(VmType.SNP)
    assert bench.vcpu(number=1).run() == FailEntryExit("VMRUN", "VMEXIT_INVALID")
    bench.close()
