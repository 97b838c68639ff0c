"""`guestmem levels`: the kernels whose interface can be had, and what two of them differ in; --abi for the others."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from guestmem.trace import Refusal
from guestmem.uapi.levels import LEVELS, AbiLevel, read_level

ABI_HELP = f"The kernel: {', '.join(LEVELS)}, or a level file of your own (guestmem levels)."
_REFUSED = 2


def find_level(abi: str) -> AbiLevel:
    """A named level, or the one of a file. Raises: Refusal `level.*`."""
    if abi in LEVELS:
        return LEVELS[abi]
    path = Path(abi)
    if path.suffix != ".toml" and not path.exists():
        raise Refusal(errno.ENOENT, "level.not_found", at=abi, there_are=", ".join(LEVELS), or_a="file NAME.toml")
    return read_level(path)


def levels(
    first: Annotated[str | None, typer.Argument(metavar="[A]", help="A level's name or file.")] = None,
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="Another one, to see the difference.")] = None,
) -> None:
    """List the ABI levels; of one all that it says; of two what they differ in. A mistake in a file exits with 2."""
    try:
        asked = [find_level(name) for name in (first, second) if name is not None]
    except Refusal as refusal:
        typer.echo(f"guestmem levels: {refusal}", err=True)
        raise typer.Exit(_REFUSED) from None
    Console(width=120, highlight=False).print(_table(asked) if asked else _list())


def _list() -> Table:
    table = Table(box=None)
    for column in ("level", "conversion", "flags", "VM types", ""):
        table.add_column(column)
    for level in LEVELS.values():
        cells = dict(entries(level))
        flags, vm_types = " ".join(level.create_flags), " ".join(vm_type.name for vm_type in level.vm_types)
        table.add_row(level.name, cells["conversion"], flags, vm_types, level.about)
    return table


def _table(asked: list[AbiLevel]) -> Table:
    """A row for each thing that they differ in, or all of one."""
    table = Table(box=None)
    table.add_column("")
    for level in asked:
        table.add_column(level.name)
    said = [dict(entries(level)) for level in asked]
    for key in dict.fromkeys(key for cells in said for key in cells):
        row = [cells.get(key, "-") for cells in said]
        if len(asked) == 1 or row[0] != row[1]:
            table.add_row(key, *row)
    return table


def entries(level: AbiLevel) -> Iterator[tuple[str, str]]:
    """All that a level says, as a reader wants it: name and value."""
    yield "conversion", "in place" if level.in_place else "by the VM"
    yield "VM types", " ".join(vm_type.name for vm_type in level.vm_types)
    yield "file system of its own", _yes(level.own_file_system)
    yield "guest_memfd in an IOAS", _yes(level.gmem_dma)
    yield "file range bound twice", errno.errorcode[level.overlap_errno]
    yield "end of a bound range is signed", _yes(level.signed_range_end)
    yield "frames are checked", "before binding" if level.prepare_before_overlap else "after binding"
    for name, mask in level.create_flags.items():
        yield f"GUEST_MEMFD_FLAG_{name}", f"1 << {mask.bit_length() - 1}"
    for name, mask in level.region_flags.items():
        yield f"KVM_MEM_{name}", f"1 << {mask.bit_length() - 1}"
    for name, request in level.ioctls.items():
        yield f"KVM_{name}", f"{request:#x}"
    for name, number in level.capabilities.items():
        answer = f", answers {level.answers[name]}" if name in level.answers else ""
        yield f"KVM_CAP_{name}", f"{number}{answer}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
