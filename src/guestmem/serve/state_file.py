"""The state file of a hand-over: what there is in which session, and which descriptor is the memory of which file.

One line of text that says what follows, then JSON. Whatever is not exactly as it was written is refused as a whole,
with the reason: another version, a byte more or less, a check sum that is not right. Nothing is changed by a refusal.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec

from guestmem.kvm.preserve import GmemRecord, VmRecord
from guestmem.memory import PAGE_SIZE

VERSION = 1
_HEADER = re.compile(rb"guestmem live update, version (\d+), (\d+) bytes, sha256 ([0-9a-f]{64})\n")


class Damaged(Exception):
    """The state cannot be used; the reason."""


class Entry(msgspec.Struct, frozen=True):
    """A preserved file. `memfd` is the name under which its memory was handed over, "" for a VM."""

    token: int
    record: VmRecord | GmemRecord
    memfd: str = ""


class State(msgspec.Struct, frozen=True):
    """`level` is the ABI of the server that wrote it; sessions by name."""

    level: str
    sessions: dict[str, list[Entry]]

    @property
    def memfds(self) -> dict[str, int]:
        """Name and size in bytes of each."""
        entries = (entry for session in self.sessions.values() for entry in session)
        return {entry.memfd: entry.record.size for entry in entries if isinstance(entry.record, GmemRecord)}


def write(path: Path, state: State) -> None:
    """Whole or not at all. Raises: OSError."""
    body = msgspec.json.encode(state)
    digest = hashlib.sha256(body).hexdigest()
    header = f"guestmem live update, version {VERSION}, {len(body)} bytes, sha256 {digest}\n".encode()
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(header + body)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read(path: Path) -> State:
    """Raises: Damaged; FileNotFoundError."""
    data = path.read_bytes()
    header = _HEADER.match(data)
    if header is None:
        raise Damaged(f"{path}: not a state file of guestmem")
    version, size, digest = int(header[1]), int(header[2]), header[3].decode()
    if version != VERSION:
        raise Damaged(f"{path}: version {version}; this guestmem reads {VERSION}")
    body = data[header.end() :]
    if len(body) != size:
        raise Damaged(f"{path}: {len(body)} bytes where there should be {size}")
    if hashlib.sha256(body).hexdigest() != digest:
        raise Damaged(f"{path}: the check sum is not right")
    try:
        state = msgspec.json.decode(body, type=State)
    except msgspec.DecodeError as error:
        raise Damaged(f"{path}: {error}") from error
    for name, entries in state.sessions.items():
        _check(f"{path}: session {name}", entries)
    _check_unique(path, state)
    return state


def _check(where: str, entries: list[Entry]) -> None:
    """What the types do not say: tokens are there once, memory has a VM, stretches are in order inside the file."""
    identities = [entry.record.identity for entry in entries if isinstance(entry.record, VmRecord)]
    if len({entry.token for entry in entries}) != len(entries):
        raise Damaged(f"{where} has a token twice")
    for entry in entries:
        record = entry.record
        if not isinstance(record, GmemRecord):
            continue
        if record.identity not in identities:
            raise Damaged(f"{where} has memory without its VM")
        borders = [0, *(border for stretch in record.converted for border in stretch), record.size // PAGE_SIZE]
        if record.size <= 0 or record.size % PAGE_SIZE or borders != sorted(borders):
            raise Damaged(f"{where} has memory of {record.size} bytes with stretches that are not inside it")


def _check_unique(path: Path, state: State) -> None:
    entries = [entry for session in state.sessions.values() for entry in session]
    names = [entry.memfd for entry in entries if isinstance(entry.record, GmemRecord)]
    numbers = [entry.record.number for entry in entries if isinstance(entry.record, VmRecord)]
    if len(set(names)) != len(names) or len(set(numbers)) != len(numbers):
        raise Damaged(f"{path}: one memory or identity is there twice")
