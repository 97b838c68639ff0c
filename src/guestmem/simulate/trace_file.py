"""A recorded trace, line by line: what `guestmem run --trace FILE.json` wrote, or a generator.

A line is an allegation until it was read, belongs to a file that is there, and names pages of it. The first that is
not ends the reading with its number and the rule that it broke.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args

import msgspec

from guestmem.memory.pages import PAGE_SHIFT, PAGE_SIZE
from guestmem.simulate.source import Replayable
from guestmem.trace import Refusal
from guestmem.trace import events as event

MAX_LINE = 1 << 16
"""Bytes. The longest event is a thousandth of this."""
MAX_PAGES = 1 << 51
MAX_ORDER = 18
_ACCESSES = ("shared", "private")
_EVENTS: Any = Union[tuple(event.Event.__subclasses__())]  # noqa: UP007 - made at run time
_REPLAYABLE = get_args(Replayable)


class TraceFile:
    """JSON lines of events. The file is read anew for each row and never held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def events(self) -> Iterator[Replayable]:
        """Raises: Refusal EINVAL `trace.line`, `.file`, `.range`, `.access`, `.nothing`; OSError."""
        decode = msgspec.json.Decoder(_EVENTS).decode
        checker = _Checker()
        held = _Held()
        with self.path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise Refusal(errno.EINVAL, "trace.line", line=str(number), why=f"longer than {MAX_LINE} bytes")
                try:
                    read = decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise Refusal(errno.EINVAL, "trace.line", line=str(number), why=str(error)) from None
                if isinstance(read, _REPLAYABLE):
                    checker.check(read, number)
                    yield from held.let_through(read)
        yield from held.rest()
        if not checker.seen:
            raise Refusal(errno.EINVAL, "trace.nothing", why="no guest_memfd is created in it")


class _Checker:
    """Which files are there, and how large they are in pages."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self._pages: dict[int, int] = {}

    def check(self, read: Replayable, line: int) -> None:
        if isinstance(read, event.GmemCreate):
            self._create(read, line)
            return
        pages = self._pages.get(read.inode)
        if pages is None:
            raise Refusal(errno.EINVAL, "trace.file", line=str(line), why=f"no guest_memfd {read.inode} is there")
        match read:
            case event.GmemDestroy():
                del self._pages[read.inode]
            case event.GmemFault():
                if not (0 <= read.index < pages and 0 <= read.order <= MAX_ORDER):
                    raise Refusal(
                        errno.EINVAL,
                        "trace.range",
                        line=str(line),
                        why=f"page {read.index:#x}, order {read.order} of {pages:#x} pages",
                    )
                _check_access(read.access, line)
            case event.GmemConvert():
                _check_range(read.start, read.end, pages, line)
                _check_access(read.to, line)
            case event.GmemFolioAlloc() | event.GmemFolioFree() | event.GmemZeroRange() | event.KvmUnbind():
                _check_range(read.start, read.end, pages, line)

    def _create(self, read: event.GmemCreate, line: int) -> None:
        if read.inode in self.seen:
            raise Refusal(
                errno.EINVAL, "trace.file", line=str(line), why=f"guest_memfd {read.inode} was created before"
            )
        if read.size <= 0 or read.size % PAGE_SIZE or read.size >> PAGE_SHIFT > MAX_PAGES:
            raise Refusal(errno.EINVAL, "trace.range", line=str(line), why=f"a file of {read.size} bytes")
        self.seen.add(read.inode)
        self._pages[read.inode] = read.size >> PAGE_SHIFT


class _Held:
    """A hole of the whole file is held back until it is known that it is not the file's end, which makes one too."""

    def __init__(self) -> None:
        self._holes: dict[int, event.GmemFolioFree] = {}
        self._sizes: dict[int, int] = {}

    def let_through(self, read: Replayable) -> Iterator[Replayable]:
        hole = self._holes.pop(read.inode, None)
        if hole is not None and not isinstance(read, event.GmemDestroy):
            yield hole
        if isinstance(read, event.GmemCreate):
            self._sizes[read.inode] = read.size >> PAGE_SHIFT
        if isinstance(read, event.GmemFolioFree) and (read.start, read.end) == (0, self._sizes[read.inode]):
            self._holes[read.inode] = read
        else:
            yield read

    def rest(self) -> Iterator[Replayable]:
        yield from self._holes.values()


def _check_range(start: int, end: int, pages: int, line: int) -> None:
    if not 0 <= start < end <= pages:
        raise Refusal(errno.EINVAL, "trace.range", line=str(line), why=f"pages {start:#x}..{end:#x} of {pages:#x}")


def _check_access(access: str, line: int) -> None:
    if access not in _ACCESSES:
        raise Refusal(errno.EINVAL, "trace.access", line=str(line), why=f"{access!r} is neither shared nor private")
