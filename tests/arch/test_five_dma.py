"""One page and two devices on every architecture: what each device finds, and what comes of a leaf that nobody took
away. The table in docs/iommu/explanation.md is this one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from guestmem.cpu.scripted import Load
from guestmem.host import Host
from guestmem.iommu import DmaFault, Domain
from guestmem.iommu.addresses import IoPage, io_page_of
from guestmem.iommu.leaves import IoLeaf
from guestmem.iommu.script import DeviceHandle
from guestmem.memory import PAGE_SIZE, Access, Range
from guestmem.trace import events as event
from guestmem.uapi.kvm import VmType
from tests.arch.test_five import IMAGE, Scenario, host

__all__ = ["host"]  # the fixture
BASE = 1 << 30
TABLE = Path(__file__).parents[2] / "docs/iommu/explanation.md"


class Found(NamedTuple):
    """A column of the table each: the guest's own device at a private page; another's read and write there; the guest's
    own at a page that is shared again."""

    own: str
    stray_read: str
    stray_write: str
    own_at_shared: str


EXPECTED = {
    VmType.SW_PROTECTED: Found("plaintext", "plaintext", "written", "plaintext"),
    VmType.SNP: Found("plaintext", "`dma.rmp`", "`dma.rmp`", "`dma.rmp`"),
    VmType.TDX: Found("plaintext", "zeros", "`dma.machine_check`", "`dma.sept`"),
    VmType.ARM_REALM: Found("plaintext", "`dma.gpt`", "`dma.gpt`", "`dma.gpt`"),
    VmType.ARM_PROTECTED: Found("plaintext", "`dma.hypervisor`", "`dma.hypervisor`", "`dma.hypervisor`"),
}


class Devices:
    """An untrusted and a trusted one, on an address space that follows the scenario's file."""

    def __init__(self, scenario: Scenario) -> None:
        iommu = scenario.host.open_iommu()
        self.space = iommu.alloc_ioas()
        self.any, self.own = (iommu.bind(scenario.host.new_dma_device()) for _ in range(2))
        self.any.attach(self.space)
        self.own.attach(iommu.alloc_hwpt(self.space, trusted=True))
        self.space.map_gmem(scenario.gmem.file, 0, PAGE_SIZE, iova=BASE, follow=True)
        self.of_any, self.of_own = self.space.ioas.domains


def leaf_of(domain: Domain) -> IoLeaf:
    leaf = domain.table.lookup(io_page_of(BASE))
    assert leaf is not None
    return leaf


def pages_of(leaf: IoLeaf) -> Range[IoPage]:
    return Range(leaf.page, IoPage(leaf.page + 1))


def read(device: DeviceHandle, plaintext: int) -> str:
    try:
        byte = device.read(BASE, 1)[0]
    except DmaFault as fault:
        return f"`{fault.refusal.rule}`"
    return {plaintext: "plaintext", 0: "zeros"}.get(byte, "other")


def write(device: DeviceHandle) -> str:
    try:
        device.write(BASE, b"d")
    except DmaFault as fault:
        return f"`{fault.refusal.rule}`"
    return "written"


@pytest.mark.parametrize("vm_type", EXPECTED)
def test_what_each_device_finds(host: Host, vm_type: VmType) -> None:
    scenario = Scenario(host, vm_type, [Load(0)])
    devices = Devices(scenario)
    events: list[event.Event] = []
    host.tracer.listen(events.append)
    own = read(devices.own, IMAGE)
    private_leaf = leaf_of(devices.of_own)
    scenario.gmem.convert(0, PAGE_SIZE, Access.SHARED)
    assert devices.of_own.table.lookup(io_page_of(BASE)) is None
    scenario.view[0] = IMAGE
    assert read(devices.any, IMAGE) == "plaintext"
    shared_leaf = leaf_of(devices.of_any)
    devices.of_own.table.map(private_leaf.page, 0, private_leaf)  # nobody took it away
    own_at_shared = read(devices.own, IMAGE)
    devices.of_own.forget(pages_of(private_leaf))
    scenario.gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
    seen = scenario.guest()  # the page is the guest's now
    devices.of_any.table.map(shared_leaf.page, 0, shared_leaf)
    stray_read = read(devices.any, seen or IMAGE)
    stray_write = write(devices.any)
    devices.of_any.forget(pages_of(shared_leaf))
    assert Found(own, stray_read, stray_write, own_at_shared) == EXPECTED[vm_type]
    resets = [each for each in events if isinstance(each, event.MachineCheck)]
    assert len(resets) == (vm_type is VmType.TDX)


@pytest.mark.parametrize("vm_type", [vm_type for vm_type in EXPECTED if vm_type is not VmType.SW_PROTECTED])
def test_what_its_guest_has_not_touched_no_device_has(host: Host, vm_type: VmType) -> None:
    """The IOMMU makes no page the guest's, and the page is there for the device when the guest has it."""
    scenario = Scenario(host, vm_type, [Load(0)])
    devices = Devices(scenario)
    scenario.gmem.convert(0, PAGE_SIZE, Access.SHARED)
    scenario.gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
    assert read(devices.own, IMAGE) == "`iommu.not_guests`"
    assert not list(scenario.platform.owned())
    scenario.guest()
    assert devices.own.read(BASE, 1)
    host.check()


def test_the_facts_name_the_architecture(host: Host) -> None:
    scenario = Scenario(host, VmType.SNP, [])
    devices = Devices(scenario)
    read(devices.own, IMAGE)
    devices.of_any.table.map(io_page_of(BASE), 0, leaf_of(devices.of_own))
    with pytest.raises(DmaFault) as fault:
        devices.any.write(BASE, b"d")
    assert fault.value.refusal.facts["architecture"] == "snp"
    devices.of_any.forget(pages_of(leaf_of(devices.of_own)))


def test_the_table_in_the_documentation() -> None:
    rows = [line.split("|")[1:-1] for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    names = {
        "software-protected": VmType.SW_PROTECTED,
        "SEV-SNP": VmType.SNP,
        "TDX": VmType.TDX,
        "CCA": VmType.ARM_REALM,
        "pKVM": VmType.ARM_PROTECTED,
    }
    cells = [[cell.strip() for cell in row] for row in rows]
    written = {names[row[0]]: Found(*row[1:]) for row in cells if row[0] in names and len(row) == 5}
    assert written == EXPECTED
