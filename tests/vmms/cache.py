"""The cache outside of the repository: what was fetched once, and with which versions."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


class CannotHaveError(Exception):
    """Something cannot be had on this machine; the text says what and why. Rows that need it are skipped."""


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/guestmem/vmms, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "guestmem" / "vmms"


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One at a time: two that fetch into one cache would take each other's folders away."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def quiet(command: Sequence[str], cwd: Path | None = None, timeout: float = 600) -> str:
    """The standard output of a command. Raises: subprocess.CalledProcessError, with its standard error."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    done.check_returncode()
    return done.stdout


def stamped(folder: Path, key: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Have `make` fill `folder`, once for each key; the versions that it returned, then or before.

    A `make` that raised has left nothing that counts.
    """
    stamp = folder.with_name(f"{folder.name}.stamp")
    if stamp.exists():
        known: dict[str, object] = json.loads(stamp.read_text())
        if known.get("key") == key:
            versions = known["versions"]
            assert isinstance(versions, dict)
            return versions
        stamp.unlink()
    made = make()
    text = json.dumps({"key": key, "versions": made}, indent=1)
    partial = stamp.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(stamp)
    return made
