"""Reading a trace: what is a cause, what is none, and where damage is found."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from guestmem.host import Host
from guestmem.memory import Access
from guestmem.simulate.source import Survey, survey
from guestmem.simulate.trace_file import MAX_LINE, TraceFile
from guestmem.trace import Refusal, json_writer
from guestmem.trace import events as event
from guestmem.uapi.kvm import VmType

CREATE = {"event": "gmem_create", "inode": 1, "size": 1 << 20, "flags": 1}
FAULT = {
    "event": "gmem_fault", "inode": 1, "index": 3, "user": "kvm", "access": "private", "pfn": 9, "order": 0,
}  # fmt: skip
CONVERT = {"event": "gmem_convert", "inode": 1, "start": 0, "end": 4, "to": "shared"}
FREE = {"event": "gmem_folio_free", "inode": 1, "start": 0, "end": 256, "detached": 0}
DESTROY = {"event": "gmem_destroy", "inode": 1}
UNMAP = {"event": "kvm_unmap", "vm": 0, "start": 0, "end": 1, "access": "private", "leaves": 1}


def written(path: Path, *lines: object) -> TraceFile:
    file = path / "trace.json"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return TraceFile(file)


def names(trace: TraceFile) -> list[str]:
    return [type(each).__name__ for each in trace.events()]


def test_only_causes_are_replayed(tmp_path: Path) -> None:
    trace = written(tmp_path, CREATE, FAULT | {"time_us": 5, "task": "vcpu 0"}, UNMAP, CONVERT)
    assert names(trace) == ["GmemCreate", "GmemFault", "GmemConvert"]


def test_the_hole_that_the_end_of_a_file_makes_is_none(tmp_path: Path) -> None:
    assert names(written(tmp_path, CREATE, FREE, DESTROY)) == ["GmemCreate", "GmemDestroy"]
    assert names(written(tmp_path, CREATE, FREE, FAULT, DESTROY)) == [
        "GmemCreate", "GmemFolioFree", "GmemFault", "GmemDestroy",
    ]  # fmt: skip
    assert names(written(tmp_path, CREATE, FREE)) == ["GmemCreate", "GmemFolioFree"]
    assert names(written(tmp_path, CREATE, FREE, UNMAP, FREE, DESTROY)) == [
        "GmemCreate", "GmemFolioFree", "GmemDestroy",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("trace.line", "{"),
        ("trace.line", ""),
        ("trace.line", "[1, 2]"),
        ("trace.line", '{"event": "gmem_convort"}'),
        ("trace.line", b"\xff\xfe".decode("latin1")),
        ("trace.line", {"event": "gmem_convert", "inode": 1, "start": 0, "end": 4}),
        ("trace.line", CONVERT | {"start": "0"}),
        ("trace.range", CONVERT | {"start": 1 << 70}),
        ("trace.line", CONVERT | {"task": "x" * MAX_LINE}),
        ("trace.line", "          python-1 0.000012: gmem_convert: inode=1 start=0 end=4 to=shared"),
        ("trace.file", CREATE),
        ("trace.file", CONVERT | {"inode": 2}),
        ("trace.file", DESTROY | {"inode": 7}),
        ("trace.range", CREATE | {"inode": 2, "size": 0}),
        ("trace.range", CREATE | {"inode": 2, "size": 4097}),
        ("trace.range", CREATE | {"inode": 2, "size": -4096}),
        ("trace.range", CREATE | {"inode": 2, "size": (1 << 63) + 4096}),
        ("trace.range", CONVERT | {"end": 0}),
        ("trace.range", CONVERT | {"start": -1}),
        ("trace.range", CONVERT | {"end": 257}),
        ("trace.range", FREE | {"end": 257}),
        ("trace.range", FAULT | {"index": 256}),
        ("trace.range", FAULT | {"index": -1}),
        ("trace.range", FAULT | {"order": 64}),
        ("trace.range", FAULT | {"order": -1}),
        ("trace.access", CONVERT | {"to": "public"}),
        ("trace.access", FAULT | {"access": ""}),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, rule: str, line: object) -> None:
    trace = written(tmp_path, CREATE, FAULT, line, FAULT)
    with pytest.raises(Refusal) as refused:
        list(trace.events())
    assert (refused.value.rule, refused.value.facts["line"]) == (rule, "3")


def test_a_file_that_is_gone_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"trace\.file.* line 3"):
        list(written(tmp_path, CREATE, DESTROY, CONVERT).events())
    with pytest.raises(Refusal, match=r"trace\.file.* line 3"):
        list(written(tmp_path, CREATE, DESTROY, CREATE).events())


def test_a_trace_of_nothing(tmp_path: Path) -> None:
    for lines in ((), (UNMAP,)):
        with pytest.raises(Refusal, match=r"trace\.nothing"):
            list(written(tmp_path, *lines).events())


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(json.dumps(CREATE).encode() + b'\n{"event": "\xff\xfe"}\n')
    with pytest.raises(Refusal, match=r"trace\.line.* line 2"):
        list(TraceFile(path).events())


def test_it_is_read_as_it_is_needed(tmp_path: Path) -> None:
    events = written(tmp_path, CREATE, FAULT, "damage").events()
    assert isinstance(next(events), event.GmemCreate)
    assert isinstance(next(events), event.GmemFault)
    with pytest.raises(Refusal):
        next(events)


def test_the_survey_knows_what_there_was_at_the_same_time(tmp_path: Path) -> None:
    second = CREATE | {"inode": 2, "size": 3 << 20}
    trace = written(tmp_path, CREATE, CONVERT, DESTROY, second, CREATE | {"inode": 3}, DESTROY | {"inode": 2})
    assert survey(trace) == Survey(6, 1, {18: 2, 9: 3, 0: 1024})


def test_what_a_host_records_can_be_read(tmp_path: Path) -> None:
    out = io.StringIO()
    with Host() as host:
        host.tracer.listen(json_writer(out, lambda: "test"))
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(1 << 20, mmap=True, init_shared=True)
        vm.set_memory_region(slot=0, gpa=0, size=1 << 20, gmem=gmem)
        gmem.mmap()[0:5] = b"hello"
        gmem.convert(0, 8192, Access.PRIVATE)
        vm.pre_fault(0, 8192)
        gmem.punch_hole(4096, 4096)
    path = tmp_path / "trace.json"
    path.write_text(out.getvalue())
    read = list(TraceFile(path).events())
    assert [type(each).__name__ for each in read if not isinstance(each, event.KvmUnbind)] == [
        "GmemCreate",
        "GmemFolioAlloc",
        "GmemFault",
        "GmemConvert",
        "GmemFault",
        "GmemFolioAlloc",
        "GmemFault",
        "GmemFolioFree",
        "GmemDestroy",
    ]
