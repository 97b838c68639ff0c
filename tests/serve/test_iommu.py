"""Clients of /dev/iommu, and a DMA engine in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestmem.iommu import Descriptor, DmaFault
from guestmem.iommu.engine import DESCRIPTOR_SIZE, Status
from guestmem.iommu.script import DeviceHandle, IoasHandle
from guestmem.memory import PAGE_SIZE, Access
from guestmem.serve import launch
from guestmem.serve.engine_process import EngineProcess
from guestmem.serve.server import Server
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import FUTURE
from tests.serve.conftest import Done

Build = Callable[[str], Path]
Guestmem = Callable[..., Done]
EXAMPLE = Path(__file__).parents[2] / "examples" / "clients" / "dma.c"
CONVERSIONS = 400
K = PAGE_SIZE
BASE = 1 << 30


@pytest.mark.parametrize("device", ["0", "4"])
def test_every_call_of_iommufd_and_vfio(device: str, build: Build, guestmem: Guestmem) -> None:
    done = guestmem("--", build("iommu"), device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    assert done.stderr == ""


def test_a_kernel_of_today_takes_no_guest_memfd(build: Build, guestmem: Guestmem) -> None:
    """What needs one fails there, what needs none does not."""
    done = guestmem("--abi", "v7.4", "--", build("iommu"))
    results = {line.rpartition(" ")[2]: line.startswith("ok") for line in done.stdout.splitlines() if "ok " in line}
    assert not results.pop("a_guest_memfd")
    assert not results.pop("the_memory_ends") and not results.pop("a_trusted_page_table")
    assert all(results.values()) and len(results) == 5


@pytest.fixture(scope="module")
def compile_example(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The example client, as its first lines say how to build it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    program = tmp_path_factory.mktemp("example") / "dma"

    def compiled(*flags: str) -> Path:
        subprocess.run(["gcc", "-Wall", "-Werror", "-pthread", *flags, "-o", program, EXAMPLE], check=True)
        return program

    return compiled


@pytest.mark.parametrize(("device", "flags"), [("0", ()), ("4", ()), ("0", ("-static",))])
def test_every_dma_moves_the_right_bytes_or_faults(
    device: str, flags: tuple[str, ...], compile_example: Callable[..., Path], guestmem: Guestmem
) -> None:
    done = guestmem("--", compile_example(*flags), str(CONVERSIONS), device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{CONVERSIONS} conversions, 0 refused; every DMA moved the right bytes or faulted\n"
    _, moved, faulted = (part.strip().split()[0] for part in done.stderr.split(","))
    assert int(moved) > 0 and int(faulted) > 0


class Served:
    """A server with a shared file mapped for a device whose engine is a process."""

    def __init__(self) -> None:
        self.server: Server = launch.make_server(FUTURE)
        host = self.server.host
        self.gmem = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(8 * K, mmap=True, init_shared=True)
        self.view = self.gmem.mmap()
        iommu = host.open_iommu()
        self.space: IoasHandle = iommu.alloc_ioas()
        self.device: DeviceHandle = iommu.bind(host.new_dma_device())
        self.device.attach(self.space)
        self.space.map_gmem(self.gmem.file, 0, 8 * K, iova=BASE, follow=True)
        self.process = EngineProcess(self.server, self.device.device)

    def run(self, coroutine: Coroutine[Any, Any, int]) -> int:
        task = self.server.scheduler.begin(coroutine, "doorbell")
        self.server.run(until=lambda: task.done)
        return task.outcome()

    def submit(self, *descriptors: Descriptor) -> list[Descriptor]:
        self.view.write(7 * K, b"".join(each.pack() for each in descriptors))
        assert self.run(self.process.doorbell(BASE + 7 * K, 64, 0, len(descriptors))) == len(descriptors)
        data = self.view.read(7 * K, len(descriptors) * DESCRIPTOR_SIZE)
        return [Descriptor.unpack(data[at : at + DESCRIPTOR_SIZE]) for at in range(0, len(data), DESCRIPTOR_SIZE)]


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.process.close()
    served.server.close()


def test_an_engine_of_its_own_gets_bytes_and_nothing_else(served: Served) -> None:
    served.view[0:5] = b"hello"
    (copy,) = served.submit(Descriptor(1, BASE, BASE + K, 5))
    assert copy.status == Status.DONE and served.view[K : K + 5] == b"hello"
    served.gmem.convert(0, K, Access.PRIVATE)
    (refused,) = served.submit(Descriptor(1, BASE, BASE + K, 5))
    assert (refused.status, refused.fault) == (Status.FAULT, BASE)
    pid = served.process.pid
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert not any("memfd" in link for link in links), links
    with open(f"/proc/{pid}/maps") as maps:
        assert "memfd" not in maps.read()


def test_an_engine_that_dies_is_a_device_that_does_nothing(served: Served) -> None:
    served.submit(Descriptor(2, target=BASE, length=1, pattern=1))
    assert served.process.pid is not None
    os.kill(served.process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(Refusal, match=r"EIO \[vfio.dead\]"):
            served.run(served.process.doorbell(BASE + 7 * K, 64, 0, 1))
    served.gmem.convert(0, 8 * K, Access.PRIVATE)
    with pytest.raises(DmaFault):
        served.device.read(BASE, 1)
