"""`guestmem demo`: a guest program on a software-protected VM, its memory one guest_memfd, and what happened to it.

The part of the VMM is played here, with the public interface only: it loads the guest through a mapping while the
memory is shared, makes it all private, runs two vCPUs, converts what they ask for, and answers. The guest's own source
is examples/guests/demo.c.
"""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from guestmem.check.invariants import PROPERTIES, check_all
from guestmem.cli.tally import Tally
from guestmem.cpu import boot
from guestmem.host import Gmem, Host, VcpuHandle, Vm
from guestmem.kvm.exits import Exit, HltExit, HypercallExit, IoExit, MemoryFaultExit
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal, json_writer, text_writer
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED, VmType
from guestmem.userspace import SigBus, View

MEMORY = 16 << 20
TABLES = 0x10000
STACK_TOP = 0x80000
STACK_SIZE = 0x10000
DATA = 0x400000
VCPUS = 2
CONSOLE_PORT, VMM_PORT = 0xE9, 0x20
EINVAL = -22


class Vmm:
    """The program that a real VMM would be. `failed` is why the demo did not end well, if it did not."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.vm: Vm = host.create_vm(VmType.SW_PROTECTED)
        self.gmem: Gmem = self.vm.create_guest_memfd(MEMORY, mmap=True, init_shared=True)
        self.vm.set_memory_region(slot=0, gpa=0, size=MEMORY, gmem=self.gmem)
        self.vm.enable_hypercalls(KVM_HC_MAP_GPA_RANGE)
        self.memory: View = self.gmem.mmap()
        self.vcpus: list[VcpuHandle] = []
        self.output = ""
        self.failed = ""
        self._answer = 0

    def boot(self, image: bytes) -> None:
        """Load the guest while its memory is shared, then make all of it private: in place, nothing is copied."""
        entry = boot.load_elf(image, self.memory.write, MEMORY)
        for number in range(VCPUS):
            stack = STACK_TOP - number * STACK_SIZE
            start = boot.long_mode(entry, stack - 8, TABLES, MEMORY, self.memory.write)
            start.regs.rdi = number
            vcpu = self.vm.create_vcpu(number)
            vcpu.engine.set_sregs(start.sregs)
            vcpu.engine.set_regs(start.regs)
            self.vcpus.append(vcpu)
        self.gmem.convert(0, MEMORY, Access.PRIVATE)

    def handle(self, exit_: Exit) -> None:
        """Do what the guest asks for; anything else ends the demo as a failure."""
        match exit_:
            case IoExit(port=port, is_write=True, data=byte) if port == CONSOLE_PORT:
                self.output += chr(byte)
            case IoExit(port=port, is_write=True, data=request) if port == VMM_PORT:
                self._answer = int(self._serve(request))
            case IoExit(port=port, is_write=False) if port == VMM_PORT:
                exit_.data = self._answer
            case HypercallExit(args=(gpa, pages, attributes)):
                exit_.ret = self._convert(gpa, pages, attributes)
            case HltExit():
                pass
            case MemoryFaultExit():
                self.failed = f"memory fault at {exit_.gpa:#x}: {exit_.refusal}"
            case _:
                self.failed = f"unexpected exit {exit_}"

    def _convert(self, gpa: int, pages: int, attributes: int) -> int:
        to = Access.PRIVATE if attributes & KVM_MAP_GPA_RANGE_ENCRYPTED else Access.SHARED
        try:
            self.gmem.convert(gpa, pages * PAGE_SIZE, to)
        except Refusal as refusal:
            self.failed = f"conversion refused: {refusal}"
            return EINVAL
        return 0

    def _serve(self, request: int) -> bool:
        """The requests of examples/guests/demo.c; whether it was as the guest expects."""
        match request:
            case 1:
                return all(self._page(page) == _pattern(page) for page in range(16, 32))
            case 2:
                try:
                    self._page(0)
                except SigBus:
                    return True
                return False
            case 3:
                asked = self._page(16).split(b"\0")[0]
                self.memory.write(DATA + 17 * PAGE_SIZE, b"42\0")
                return asked == b"what is the answer?"
            case 4:
                self.gmem.punch_hole(DATA + 32 * PAGE_SIZE, 32 * PAGE_SIZE)
                return True
        self.failed = f"the guest asks for {request}, which is nothing"
        return False

    def _page(self, page: int) -> bytes:
        return self.memory.read(DATA + page * PAGE_SIZE, PAGE_SIZE)


def _pattern(page: int) -> bytes:
    return bytes((page * 7 + offset * 13 + 1) & 0xFF for offset in range(PAGE_SIZE))


def demo(
    trace: Annotated[
        Path | None, typer.Option(help="Write every event to this file; JSON lines for *.json[l].")
    ] = None,
    pace: Annotated[float | None, typer.Option(help="Seconds between steps; 0 is as fast as it goes.")] = None,
) -> None:
    """Boot a guest whose memory guest_memfd provides, shares, converts and reclaims; print what happened."""
    console = Console()
    host = Host()
    tally = Tally()
    host.tracer.listen(tally.see)
    began = time.monotonic()
    with _traced(host, trace):
        vmm = Vmm(host)
        try:
            _run(vmm, Screen(console, pace))
            held = host.pool.statistics().allocated
            check_all(host)
        finally:
            host.close()
    check_all(host)
    left = _left(host)
    console.print(tally.table(held_bytes=held * PAGE_SIZE, seconds=time.monotonic() - began))
    if "FAIL" in vmm.output or vmm.failed or left:
        console.print(f"[red]failed:[/red] {vmm.failed or left or 'see above'}")
        raise typer.Exit(1)
    console.print(f"Returned after teardown: every page, inode, VM and identity. {len(PROPERTIES)} properties checked.")


@contextmanager
def _traced(host: Host, path: Path | None) -> Iterator[None]:
    """Write the host's events to `path`, if there is one."""
    if path is None:
        yield
        return
    with path.open("w") as out:
        writer = json_writer if path.suffix.startswith(".json") else text_writer
        stop = host.tracer.listen(writer(out, lambda: host.scheduler.current.name if host.scheduler.current else "-"))
        yield
        stop()


def _run(vmm: Vmm, screen: Screen) -> None:
    image = importlib.resources.files("guestmem.cli").joinpath("demo.elf").read_bytes()
    vmm.boot(image)
    with screen:
        for _, exit_ in vmm.host.run_vcpus(*vmm.vcpus):
            before = vmm.output
            vmm.handle(exit_)
            if vmm.failed:
                return
            if isinstance(exit_, HypercallExit):
                screen.ranges_changed(vmm)
            elif vmm.output != before and vmm.output.endswith("\n"):
                screen.guest_said(vmm)


class Screen:
    """Where the demo shows itself: a live picture on a terminal, otherwise line after line."""

    def __init__(self, console: Console, pace: float | None) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._pace = pace if pace is not None else 0.3 if self._live else 0.0
        self._shown = 0

    def __enter__(self) -> None:
        if self._live:
            self._live.start()

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def ranges_changed(self, vmm: Vmm) -> None:
        if self._live is None:
            self._console.print(_ranges(vmm))
        self._show(vmm)

    def guest_said(self, vmm: Vmm) -> None:
        if self._live is None:
            self._console.print(Text(vmm.output[self._shown :].rstrip("\n")))
            self._shown = len(vmm.output)
        self._show(vmm)

    def _show(self, vmm: Vmm) -> None:
        if self._live:
            panel = Panel(Text(vmm.output.rstrip("\n")), title="the guest says", title_align="left")
            self._live.update(Group(_ranges(vmm), panel), refresh=True)
        time.sleep(self._pace)


def _ranges(vmm: Vmm) -> Table:
    """The stretches of one access in the guest's memory, and who has how much of each."""
    table = Table("range", "access", "allocated", "guest leaves", "host entries", title="guest_memfd, 16 MiB")
    first_vpn = vmm.memory.hva // PAGE_SIZE
    entries = [vpn - first_vpn for vpn, _, _ in vmm.host.process.mm.page_table.leaves()]
    for offset, size, access in vmm.gmem.accesses():
        pages = range(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE)
        leaves = [gfn for gfn, _, _ in vmm.vm.kvm.stage2.tables[access].leaves()]
        allocated = vmm.gmem.inode.folios.present.range_cardinality(pages.start, pages.stop)
        style = "green" if access is Access.SHARED else "magenta"
        table.add_row(
            f"{offset:#08x}-{offset + size:#08x}",
            f"[{style}]{access.value}[/{style}]",
            f"{allocated * PAGE_SIZE >> 10} KiB",
            str(sum(gfn in pages for gfn in leaves)),
            str(sum(page in pages for page in entries)),
        )
    return table


def _left(host: Host) -> str:
    """What is still there although everything was closed; "" if nothing is."""
    left = {
        "pages": host.pool.statistics().allocated,
        "inodes": sum(not inode.destroyed for inode in host.inodes),
        "VMs": sum(not kvm.destroyed for kvm in host.vms),
        "identities": len(host.identities.live),
    }
    return ", ".join(f"{count} {what} left" for what, count in left.items() if count)
