"""What happened: one event schema, its writers, and the refusal that names its rule."""

from guestmem.trace.refusal import EHWPOISON, Refusal, errno_name, format_facts
from guestmem.trace.tracer import Listener, Tracer
from guestmem.trace.writers import json_writer, text_writer

__all__ = [
    "EHWPOISON",
    "Listener",
    "Refusal",
    "Tracer",
    "errno_name",
    "format_facts",
    "json_writer",
    "text_writer",
]
