"""Refusals, the tracer and its writers."""

from __future__ import annotations

import errno
import io
import json
import pickle

import msgspec
import pytest

from guestmem.trace import EHWPOISON, Refusal, Tracer, errno_name, format_facts, json_writer, text_writer
from guestmem.trace import events as event
from guestmem.trace.writers import text_line

ALL = event.Event.__subclasses__()


def test_a_refusal_is_an_oserror_with_its_rule_and_numbers() -> None:
    refusal = Refusal(errno.EINVAL, "bind.past_end", offset=0x2000, size=0x2000, file_size=0x3000)
    assert isinstance(refusal, OSError)
    assert str(refusal) == "EINVAL [bind.past_end] offset 0x2000, size 0x2000, file_size 0x3000"
    assert str(Refusal(errno.EAGAIN, "convert.busy")) == "EAGAIN [convert.busy]"


def test_a_refusal_survives_another_process() -> None:
    refusal = pickle.loads(pickle.dumps(Refusal(errno.EAGAIN, "convert.busy", error_offset=4096)))
    assert (refusal.errno, refusal.rule, refusal.facts) == (errno.EAGAIN, "convert.busy", {"error_offset": 4096})


@pytest.mark.parametrize(
    ("number", "name"), [(22, "EINVAL"), (95, "EOPNOTSUPP"), (EHWPOISON, "EHWPOISON"), (9999, "9999"), (None, "?")]
)
def test_errno_names_are_the_kernels(number: int | None, name: str) -> None:
    assert errno_name(number) == name


def test_facts_are_read_as_addresses_are() -> None:
    assert format_facts({"slot": 3, "gpa": 4096, "state": "private", "ok": True}) == (
        "slot 3, gpa 0x1000, state private, ok True"
    )


def test_nobody_listening_costs_nothing_and_listeners_come_and_go() -> None:
    tracer = Tracer()
    assert not tracer.enabled
    seen: list[event.Event] = []
    stop = tracer.listen(seen.append)
    stop_other = tracer.listen(lambda _: None)
    tracer.emit(event.GmemDestroy(1))
    stop()
    assert tracer.enabled
    stop_other()
    assert not tracer.enabled
    assert seen == [event.GmemDestroy(1)]


def test_every_event_has_a_name_of_its_own() -> None:
    tags = [kind.__struct_config__.tag for kind in ALL]
    assert len(set(tags)) == len(tags) > 15


def test_text_has_the_shape_of_ftrace() -> None:
    line = text_line(event.KvmPageFault(0, 1, 0x5000, "private", True, "mapped"), 1.5, "vcpu 1")
    assert line == (
        "          vcpu 1     1.500000: kvm_page_fault: vm=0 vcpu=1 gpa=0x5000 access=private write=True result=mapped"
    )


def test_writers_write_each_event_once() -> None:
    text, lines = io.StringIO(), io.StringIO()
    tracer = Tracer()
    tracer.listen(text_writer(text, lambda: "task"))
    tracer.listen(json_writer(lines, lambda: "task"))
    tracer.emit(event.GmemConvert(7, 0, 512, "private"))
    tracer.emit(event.GmemDestroy(7))
    assert [line.split(": ")[1] for line in text.getvalue().splitlines()] == ["gmem_convert", "gmem_destroy"]
    first = json.loads(lines.getvalue().splitlines()[0])
    assert first.pop("time_us") >= 0
    assert first == {"task": "task", "event": "gmem_convert", "inode": 7, "start": 0, "end": 512, "to": "private"}


def test_json_lines_decode_to_the_same_events() -> None:
    union = msgspec.json.Decoder(event.GmemConvert | event.GmemDestroy)
    sent = event.GmemConvert(7, 0, 512, "private")
    assert union.decode(msgspec.json.encode(sent)) == sent
