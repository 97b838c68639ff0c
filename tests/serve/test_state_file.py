"""The state file: what was written is read; anything else is refused whole, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestmem.kvm.preserve import GmemRecord, VmRecord
from guestmem.serve import state_file
from guestmem.serve.state_file import Damaged, Entry, State

VM = Entry(7, VmRecord(1, 4, 9))
MEMORY = Entry(9, GmemRecord(16384, True, True, True, [(1, 2), (3, 4)], 4, 9), "guestmem-0")
STATE = State("future", {"guest": [VM, MEMORY], "empty": []})


def written(path: Path, state: State = STATE) -> Path:
    state_file.write(path / "state", state)
    return path / "state"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert state_file.read(written(tmp_path)) == STATE
    assert STATE.memfds == {"guestmem-0": 16384}
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_every_changed_and_every_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(Damaged):
            state_file.read(path)
        path.write_bytes(good[:place])
        with pytest.raises(Damaged):
            state_file.read(path)
    path.write_bytes(good + b" ")
    with pytest.raises(Damaged, match="bytes where there should be"):
        state_file.read(path)


def test_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(state_file, "VERSION", 2)
    with pytest.raises(Damaged, match="version 1; this guestmem reads 2"):
        state_file.read(path)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([VM, VM], "token twice"),
        ([MEMORY], "memory without its VM"),
        ([VM, Entry(1, VmRecord(1, 4, 8))], "there twice"),
        ([VM, MEMORY, Entry(1, MEMORY.record, "guestmem-0")], "there twice"),
        ([VM, Entry(9, GmemRecord(4096, True, True, True, [(0, 2)], 4, 9), "m")], "not inside it"),
        ([VM, Entry(9, GmemRecord(4096, True, True, True, [(-1, 1)], 4, 9), "m")], "not inside it"),
        ([VM, Entry(9, GmemRecord(4095, True, True, True, [], 4, 9), "m")], "not inside it"),
        ([VM, Entry(9, GmemRecord(16384, True, True, True, [(2, 3), (0, 1)], 4, 9), "m")], "not inside it"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, entries: list[Entry], why: str) -> None:
    with pytest.raises(Damaged, match=why):
        state_file.read(written(tmp_path, State("future", {"one": entries})))
