"""What a signal would do to a thread of a client."""

from __future__ import annotations

import signal

_IGNORED_BY_DEFAULT = (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)


def is_ignored(tid: int, number: int) -> bool:
    """Whether the thread would not notice: no call of it is interrupted then, though a traced one stops."""
    caught = ignored = 0
    try:
        with open(f"/proc/{tid}/status") as status:
            for line in status:
                if line.startswith("SigIgn:"):
                    ignored = int(line[7:], 16)
                elif line.startswith("SigCgt:"):
                    caught = int(line[7:], 16)
                    break
    except OSError:
        return False
    bit = 1 << (number - 1)
    return bool(ignored & bit) or (not caught & bit and number in _IGNORED_BY_DEFAULT)
