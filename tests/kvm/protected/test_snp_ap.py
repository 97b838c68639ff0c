"""An SNP guest validates its pages, makes a vCPU run with a page of its own, and ends it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.arch.snp import SnpGuest, SnpPlatform, vmsa
from guestmem.arch.snp.rmp import Status
from guestmem.check.protected import CREATE_AP, GHCB, MAKE_VMSA, VMSA, ghcb
from guestmem.cpu.engine import Pvalidate, Rmpadjust
from guestmem.cpu.registers import Regs, Sregs
from guestmem.cpu.scripted import Load, ScriptedEngine, Step, Store, Write
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.exits import FailEntryExit, HltExit, InterruptedExit, MemoryFaultExit
from guestmem.kvm.irqchip import IrqChip
from guestmem.kvm.protected import snp_ap
from guestmem.kvm.protected.ghcb import AP_CREATION
from guestmem.kvm.protected.snp_ap import CREATE_ON_INIT, DESTROY
from guestmem.memory import ORDER_2M, PAGE_SIZE, Access, PageIndex, read_host
from guestmem.uapi.kvm import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, VmType
from tests.kvm.conftest import Bench
from tests.kvm.protected.guest_calls import SHARED, Guest

K = PAGE_SIZE
NOT_ENTERED = FailEntryExit("VMRUN", "VMEXIT_INVALID")
START = Regs(rip=0x1234, rsp=0x8000, rsi=5, rflags=0x46)


@pytest.fixture
def guest() -> Iterator[Guest]:
    """vCPU 1 is the boss, vCPU 0 what it makes."""
    made = Guest(VmType.SNP, vcpus=2)
    made.gmem.convert(GHCB, K, Access.SHARED)
    made.vcpus[0].mp_state = KVM_MP_STATE_HALTED
    made.engine(0).script = [Load(0), Load(0)]
    yield made
    made.bench.close()


def _boss(guest: Guest, *script: Step) -> None:
    assert guest.does(*script, number=1) == HltExit()


def _state(guest: Guest) -> tuple[Regs, Sregs]:
    """What is in the VMSA page."""
    page = guest.gmem.inode.backing.hva(PageIndex(VMSA // K))
    return vmsa.load(read_host(page, K))


def _creates(request: int, gpa: int = VMSA) -> tuple[Step, ...]:
    return ghcb(GHCB, AP_CREATION, request, gpa, vmsa.SNP_ACTIVE)


def test_it_starts_at_the_state_in_its_page(guest: Guest) -> None:
    sregs = Sregs(cr0=0x80000011, cr3=0x7000, cr4=0x20, efer=0x500)
    _boss(guest, *MAKE_VMSA, Write(VMSA, vmsa.save(bytes(K), START, sregs)), *CREATE_AP)
    assert guest.run(0) == HltExit()
    assert guest.engine(0).loaded == [7, 7]
    assert guest.engine(0).get_regs() == START
    loaded = guest.engine(0).get_sregs()
    assert (loaded.cr0, loaded.cr3, loaded.cr4, loaded.efer) == (0x80000011, 0x7000, 0x20, 0x500)
    assert guest.vcpus[0].mp_state == KVM_MP_STATE_RUNNABLE


def test_its_features_are_those_of_the_vm(guest: Guest) -> None:
    """What KVM_SEV_INIT2 was given, and no others. Source: sev_snp_ap_creation, sev->vmsa_features."""
    owner = guest.vm.kvm.machine.architecture
    assert isinstance(owner, SnpGuest)
    owner.vmsa_features = vmsa.SNP_ACTIVE | vmsa.DEBUG_SWAP
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    assert not guest.vcpus[0].guest_mode.waiting_for_reset  # type: ignore[union-attr]
    assert guest.run(0) == HltExit()
    assert guest.engine(0).loaded == []
    _boss(guest, *ghcb(GHCB, AP_CREATION, snp_ap.CREATE, VMSA, owner.vmsa_features))
    assert guest.run(0) == HltExit()
    assert guest.engine(0).loaded == [7, 7]


def test_its_state_is_in_its_page_when_it_is_out(guest: Guest) -> None:
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    guest.run(0)
    guest.engine(0).set_regs(START)
    guest.run(0)
    assert _state(guest)[0] == START


def test_it_halts_until_it_is_made_and_when_it_is_ended(guest: Guest) -> None:
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0
    _boss(guest, *MAKE_VMSA, *CREATE_AP, *ghcb(GHCB, AP_CREATION, DESTROY))
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0
    guest.vcpus[0].mp_state = KVM_MP_STATE_RUNNABLE
    assert guest.run(0) == NOT_ENTERED, "userspace forces it to run"


def test_a_page_that_is_no_vmsa(guest: Guest) -> None:
    _boss(guest, *CREATE_AP)
    assert guest.run(0) == NOT_ENTERED


@pytest.mark.parametrize("gpa", [GHCB, 1 << 30 | K], ids=["shared", "no memory"])
def test_no_private_page(guest: Guest, gpa: int) -> None:
    _boss(guest, *_creates(snp_ap.CREATE, gpa))
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0


def test_create_on_init_waits_for_one(guest: Guest) -> None:
    _boss(guest, *MAKE_VMSA, *_creates(CREATE_ON_INIT))
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0


def test_its_page_leaves_the_file(guest: Guest) -> None:
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    guest.run(0)
    guest.gmem.punch_hole(VMSA, K)
    assert not guest.gmem.inode.unmap_failed
    assert guest.run(0) == NOT_ENTERED, "a new page is no VMSA"


def test_its_page_is_shared(guest: Guest) -> None:
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    guest.run(0)
    guest.gmem.convert(VMSA, K, Access.SHARED)
    guest.engine(0).done = 0
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0


def test_its_slot_goes(guest: Guest) -> None:
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    guest.run(0)
    guest.vm.set_memory_region(0, 0, 0)
    assert not guest.gmem.inode.unmap_failed
    guest.engine(0).done = 0
    assert guest.run(0) == HltExit()
    assert guest.engine(0).done == 0


def test_with_an_interrupt_controller_it_sleeps_in_the_kernel(guest: Guest) -> None:
    guest.vm.kvm.irqchip = IrqChip(guest.vm.kvm.scheduler.timers)
    scheduler = guest.bench.host.scheduler
    seen = []

    async def both() -> None:
        sleeper = scheduler.spawn(guest.vcpus[0].run(), "ap")
        await scheduler.cond_resched("let it sleep")
        seen.append(guest.engine(0).done)
        engine = guest.engine(1)
        engine.script = [*MAKE_VMSA, *CREATE_AP]
        boss = scheduler.spawn(guest.vcpus[1].run(), "boss")
        while guest.engine(0).done < 2:
            await scheduler.cond_resched("until it has run")
        sleeper.signal_pending = boss.signal_pending = True
        assert [type(await scheduler.join(sleeper)), type(await scheduler.join(boss))] == [InterruptedExit] * 2

    guest.bench.run(both())
    assert seen == [0]
    assert guest.engine(0).loaded == [7, 7]


# Pages


def test_a_page_is_validated_that_was_never_touched(guest: Guest) -> None:
    _boss(guest, Pvalidate(0, False, True), Pvalidate(0, False, True), Pvalidate(0, False, False))
    assert guest.engine(1).completed == [0, 1 << 32, 0]


def test_a_guest_that_does_not_validate_lazily(guest: Guest) -> None:
    platform = guest.bench.host.platforms[VmType.SNP]
    assert isinstance(platform, SnpPlatform)
    platform.guests_validate = False
    assert isinstance(guest.does(Store(0, 1), number=1), MemoryFaultExit)
    _boss(guest, Pvalidate(0, False, True), Store(0, 1), Load(0))
    assert guest.engine(1).loaded == [1]


def test_rmpadjust_of_a_page_that_is_not_valid(guest: Guest) -> None:
    _boss(guest, Rmpadjust(0, False, 1, 0, vmsa=True))
    assert guest.engine(1).completed == [(29, 0x404)]


def test_rmpadjust_of_a_vmsa_in_use(guest: Guest) -> None:
    """A vCPU that adjusts the page it runs with: only while it is inside is that refused."""
    _boss(guest, *MAKE_VMSA, *CREATE_AP)
    guest.engine(0).script = [Rmpadjust(VMSA, False, 1, 0, vmsa=False)]
    assert guest.run(0) == HltExit()
    assert guest.engine(0).completed == [Status.FAIL_INUSE]


def test_a_page_that_is_shared_or_nowhere(guest: Guest) -> None:
    for gpa in (SHARED, 1 << 30):
        exit_ = guest.does(Pvalidate(gpa, False, True), number=1)
        assert isinstance(exit_, MemoryFaultExit)
        assert (exit_.gpa, exit_.private) == (gpa, True)


def test_4k_of_a_page_that_the_rmp_has_as_2m() -> None:
    """Source: sev_handle_rmp_fault: the entry is split, the leaf goes, and the instruction is repeated."""
    bench = Bench(VmType.SNP, pages=2048, hugepages={ORDER_2M: 1})
    bench.vm.launch.start()
    gmem = bench.vm.create_guest_memfd(K << ORDER_2M, order=ORDER_2M)
    bench.vm.set_memory_region(0, 0, K << ORDER_2M, gmem=gmem)
    vcpu = bench.vcpu()
    bench.vm.launch.finish()
    assert isinstance(vcpu.engine, ScriptedEngine)
    vcpu.engine.script = [Store(0, 1), Pvalidate(0, True, True), Pvalidate(K, False, True), Load(0)]
    assert vcpu.run() == HltExit()
    assert vcpu.engine.completed == [1 << 32, 1 << 32]
    assert vcpu.engine.loaded == [1]
    leaf = bench.vm.kvm.stage2.lookup(Gfn(1), Access.PRIVATE)
    assert leaf is not None and leaf.order == 0
    bench.close()


def test_it_moves_with_the_identity(guest: Guest) -> None:
    """What the guest asked for last is asked of the vCPU that has the number now."""
    _boss(guest, *MAKE_VMSA, Write(VMSA, vmsa.save(bytes(K), START, Sregs())), *CREATE_AP)
    new = guest.bench.host.create_vm(VmType.SNP)
    new.set_memory_region(0, 0, 4 * K, gmem=new.link_guest_memfd(guest.gmem))
    vcpu = guest.bench.vcpu(Load(0), vm=new)
    new.move_enc_context_from(guest.vm)
    assert vcpu.run() == HltExit()
    assert isinstance(vcpu.engine, ScriptedEngine)
    assert vcpu.engine.loaded == [7]
    assert vcpu.engine.get_regs() == START
