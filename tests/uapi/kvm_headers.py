"""`python -m tests.uapi.kvm_headers`: linux/kvm.h and asm/kvm.h of the kernels of our levels, outside the repository.

Debian's linux-libc-dev has those of the kernels that a suite ships; the newest of the level's release is taken. The apt
of this machine is not changed: lists and packages go to a directory of their own below the cache. Kernels that no suite
has can be put there by hand, as `LEVEL/linux/kvm.h` and `LEVEL/asm/kvm.h` of `make headers_install`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from tests.suites import Suites

RELEASES = {"v6.12": "6.12.", "v6.18": "6.18.", "v7.3": "7.3.", "v7.4": "7.4."}
BUILT_LIKE = {"v7.4-vm-attributes": "v7.4", "future": "v7.4"}
"""Another build has the same headers; what is only posted has none."""

_DEFINE = re.compile(r"^#define[ \t]+(\w+)[ \t]+(.+?)[ \t]*(?:/\*.*)?$", re.MULTILINE)


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "guestmem" / "kvm-headers"


def definitions(level: str) -> dict[str, str]:
    """The macros of the two headers of a level's kernel, name to text. Raises: FileNotFoundError."""
    found = {}
    for header in ("linux/kvm.h", "asm/kvm.h"):
        text = (cache_dir() / BUILT_LIKE.get(level, level) / header).read_text(encoding="utf-8")
        found.update(dict(_DEFINE.findall(text)))
    return found


def _take(suites: Suites, version: str, into: Path) -> None:
    with tempfile.TemporaryDirectory() as root:
        suites.unpack("linux-libc-dev", version, Path(root))
        include = Path(root) / "usr/include"
        for header, source in (("linux/kvm.h", "linux/kvm.h"), ("asm/kvm.h", "x86_64-linux-gnu/asm/kvm.h")):
            target = into / header
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(include / source, target)


def main() -> None:
    """Fetch what there is and say what was taken for which level."""
    suites = Suites(cache_dir() / "apt")
    versions = suites.versions("linux-libc-dev")
    for level, release in RELEASES.items():
        version = next((version for version in versions if version.startswith(release)), None)
        if version is not None:
            _take(suites, version, cache_dir() / level)
        print(f"{level}: {version or 'no suite has one'}")


if __name__ == "__main__":
    main()
