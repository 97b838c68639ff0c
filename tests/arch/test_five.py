"""One guest, one host, one scenario on every architecture: what each finds in a page after it has changed hands. The
table in docs/arch/explanation.md is this one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from guestmem.arch import FirmwareError
from guestmem.cpu.engine import GuestMemory
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Host, VcpuHandle
from guestmem.memory import PAGE_SIZE, Access, PageIndex
from guestmem.uapi.kvm import VmType
from guestmem.userspace import View

IMAGE, SECRET, MESSAGE = 0x11, 0x5E, 0x3E
SNP_POLICY = 0x30000  # SMT, and the bit that is always set
TABLE = Path(__file__).parents[2] / "docs/arch/explanation.md"


class Found(NamedTuple):
    """A column of the table each."""

    image: str
    private: str
    to_shared: str
    to_private: str
    hole: str


EXPECTED = {
    VmType.SW_PROTECTED: Found("plaintext", "plaintext", "plaintext", "plaintext", "zeros"),
    VmType.SNP: Found("plaintext", "ciphertext", "ciphertext", "garbage", "zeros"),
    VmType.TDX: Found("plaintext", "zeros", "zeros", "zeros", "zeros"),
    VmType.ARM_REALM: Found("plaintext", "fault", "zeros", "zeros", "zeros"),
    VmType.ARM_PROTECTED: Found("plaintext", "fault", "plaintext", "plaintext", "zeros"),
}


class Scenario:
    """A VM with one page, which has been launched with IMAGE in it."""

    def __init__(self, host: Host, vm_type: VmType, scripts: list[Load | Store]) -> None:
        self.host = host
        self.platform = host.platforms[vm_type]
        vm = host.create_vm(vm_type)
        self.gmem: Gmem = vm.create_guest_memfd(PAGE_SIZE, mmap=True, init_shared=True)
        vm.set_memory_region(0, 0, PAGE_SIZE, gmem=self.gmem)
        self.view: View = self.gmem.mmap()
        self.view[0] = IMAGE
        self.gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
        self._vcpus: list[VcpuHandle] = []
        for number, step in enumerate(scripts):
            _script[:] = [step]
            self._vcpus.append(vm.create_vcpu(number))
        if vm_type is not VmType.SW_PROTECTED:
            vm.launch.start(SNP_POLICY if vm_type is VmType.SNP else None)
            vm.launch.update(0)
            vm.launch.finish()

    def guest(self) -> int | None:
        """The guest's next step: the byte that it loads, None for a store."""
        vcpu = self._vcpus.pop(0)
        vcpu.run()
        assert isinstance(vcpu.engine, ScriptedEngine)
        return vcpu.engine.loaded[-1] if vcpu.engine.loaded else None

    def host_read(self) -> str:
        """What a host sees that reads the page, whosever it is."""
        pfn = self.gmem.inode.folios.pfn(PageIndex(0))
        assert pfn is not None
        try:
            seen = self.platform.host_read(pfn, self.gmem.inode.backing.hva(PageIndex(0)))
        except FirmwareError:
            return "fault"
        return _word(seen[0], SECRET, "ciphertext")


_script: list[Load | Store] = []


def _word(byte: object, plaintext: int, otherwise: str) -> str:
    return "plaintext" if byte == plaintext else "zeros" if byte == 0 else otherwise


@pytest.fixture
def host() -> Iterator[Host]:
    def engine(memory: GuestMemory) -> ScriptedEngine:
        return ScriptedEngine(memory, list(_script))

    with Host(memory=64 * PAGE_SIZE, engine=engine, debug=True) as host:
        yield host


@pytest.mark.parametrize("vm_type", EXPECTED)
def test_what_each_finds(host: Host, vm_type: VmType) -> None:
    scenario = Scenario(host, vm_type, [Load(0), Store(0, SECRET), Load(0)])
    image = _word(scenario.guest(), IMAGE, "garbage")
    scenario.guest()
    private = scenario.host_read()
    scenario.gmem.convert(0, PAGE_SIZE, Access.SHARED)
    to_shared = _word(scenario.view[0], SECRET, "ciphertext")
    scenario.view[0] = MESSAGE
    scenario.gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
    to_private = _word(scenario.guest(), MESSAGE, "garbage")
    host.check()
    scenario.gmem.punch_hole(0, PAGE_SIZE)
    assert not list(scenario.platform.owned())
    scenario.gmem.convert(0, PAGE_SIZE, Access.SHARED)
    hole = _word(scenario.view[0], SECRET, "other")
    assert Found(image, private, to_shared, to_private, hole) == EXPECTED[vm_type]


@pytest.mark.parametrize("vm_type", EXPECTED)
def test_nothing_is_left_at_the_end(vm_type: VmType) -> None:
    host = Host(memory=64 * PAGE_SIZE, engine=lambda memory: ScriptedEngine(memory, [Store(0, SECRET)]), debug=True)
    _script[:] = [Store(0, SECRET)]
    scenario = Scenario(host, vm_type, [Store(0, SECRET)])
    scenario.guest()
    host.close()
    assert not list(scenario.platform.owned())
    assert not host.identities.live
    assert host.pool.statistics().allocated == host.pool.statistics().retired


def test_the_table_in_the_documentation() -> None:
    first = TABLE.read_text().partition("## ")[0]
    rows = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("| ")]
    names = {
        "software-protected": VmType.SW_PROTECTED,
        "SEV-SNP": VmType.SNP,
        "TDX": VmType.TDX,
        "CCA": VmType.ARM_REALM,
        "pKVM": VmType.ARM_PROTECTED,
    }
    cells = [[cell.strip() for cell in row] for row in rows]
    written = {names[row[0]]: Found(*row[1:]) for row in cells if row[0] in names and len(row) == 6}
    assert written == EXPECTED
