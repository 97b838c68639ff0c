"""Writers: an event stream as text in the shape of ftrace, or as JSON lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

import msgspec

from guestmem.trace.events import Event
from guestmem.trace.tracer import Listener


def text_line(event: Event, time_s: float, task: str) -> str:
    """One line as `trace-cmd report` prints it: task, seconds since the start, event name, fields."""
    fields = msgspec.structs.asdict(event)
    shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    return f"{task:>16} {time_s:12.6f}: {event.__struct_config__.tag}: {shown}"


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 4096:
        return hex(value)
    return str(value)


def text_writer(out: TextIO, current_task: Callable[[], str]) -> Listener:
    """A listener that writes text lines to `out`."""
    began = time.monotonic()

    def write(event: Event) -> None:
        out.write(text_line(event, time.monotonic() - began, current_task()) + "\n")

    return write


def json_writer(out: TextIO, current_task: Callable[[], str]) -> Listener:
    """A listener that writes one JSON object a line: the event's fields, `event`, `task` and `time_us`."""
    began = time.monotonic()
    encode = msgspec.json.Encoder().encode

    def write(event: Event) -> None:
        stamped = {"time_us": round((time.monotonic() - began) * 1e6), "task": current_task()}
        out.write(encode(stamped | msgspec.to_builtins(event)).decode() + "\n")

    return write
