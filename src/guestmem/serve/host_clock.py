"""The frequency that guests are told their time-stamp counter has."""

from __future__ import annotations

import functools

_FALLBACK_KHZ = 2_000_000


@functools.cache
def tsc_khz() -> int:
    """kHz of this machine's CPU, as /proc/cpuinfo has it."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("cpu MHz"):
                    return int(float(line.split(":")[1]) * 1000) or _FALLBACK_KHZ
    except (OSError, ValueError):
        pass
    return _FALLBACK_KHZ
