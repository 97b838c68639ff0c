"""Tracer: hands each event to those who listen.

With no listener `enabled` is false, and the rooms do not even build the event: an event costs nothing that nobody
reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from guestmem.trace.events import Event

Listener: TypeAlias = Callable[[Event], None]


class Tracer:
    """The event stream of one Host."""

    __slots__ = ("_listeners", "enabled")

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self.enabled = False

    def __fingerprint__(self) -> None:
        """Who listens is not part of the state."""

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Give every event from now on to `listener`; returns what ends that."""
        self._listeners.append(listener)
        self.enabled = True

        def stop() -> None:
            self._listeners.remove(listener)
            self.enabled = bool(self._listeners)

        return stop

    def emit(self, event: Event) -> None:
        """Call only when `enabled`. A listener that raises stops the operation: listeners are part of the tool."""
        for listener in self._listeners:
            listener(event)
