"""KVM_TRANSLATE only reads page tables: they may be where nobody may write, and are not dirtied."""

from __future__ import annotations

import pytest

from guestmem.cpu.registers import Sregs
from guestmem.cpu.x86 import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, PTE_P, PTE_PS
from guestmem.kvm.dirty_log import get_dirty_log
from guestmem.kvm.translate import translate
from guestmem.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, VmType
from tests.kvm.conftest import Bench, K


@pytest.mark.parametrize("flags", [0, KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES])
def test_tables_are_read_where_they_may_not_be_written(flags: int) -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    memory = bench.host.anonymous(4 * K)
    for page, entry in ((0, K | PTE_P), (1, 2 * K | PTE_P), (2, 0x4020_0000 | PTE_P | PTE_PS)):
        memory.write(page * K, entry.to_bytes(8, "little"))
    bench.vm.set_memory_region(0, 0, 4 * K, memory=memory, flags=flags)
    vcpu = bench.vcpu().vcpu
    vcpu.engine.set_sregs(Sregs(cr0=CR0_PE | CR0_PG, cr3=0, cr4=CR4_PAE, efer=EFER_LMA | EFER_LME))
    assert bench.run(translate(vcpu, 0x1234)) == 0x4020_1234
    assert bench.run(translate(vcpu, 1 << 39)) is None
    if flags == KVM_MEM_LOG_DIRTY_PAGES:
        assert not any(bench.run(get_dirty_log(bench.vm.kvm, 0)))
    bench.close()
