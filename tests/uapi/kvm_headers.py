"""`python -m tests.uapi.kvm_headers`: linux/kvm.h and asm/kvm.h of the kernels of our levels, outside the repository.

Debian's linux-libc-dev has those of the kernels that a suite ships; the newest of the level's release is taken. The apt
of this machine is not changed: lists and packages go to a directory of their own below the cache. Kernels that no suite
has can be put there by hand, as `LEVEL/linux/kvm.h` and `LEVEL/asm/kvm.h` of `make headers_install`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

SUITES = ("trixie", "trixie-backports", "forky", "sid")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
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


def _apt(tool: str, *arguments: str, directory: Path) -> str:
    options = {
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": directory / "lists",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    done = subprocess.run([tool, *flags, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout


def _versions(directory: Path) -> list[str]:
    """Newest first, as apt lists them."""
    rows = _apt("apt-cache", "madison", "linux-libc-dev", directory=directory).splitlines()
    return [row.split("|")[1].strip() for row in rows if not row.rstrip().endswith("Sources")]


def _take(version: str, into: Path, directory: Path) -> None:
    _apt("apt-get", "download", "-qq", f"linux-libc-dev={version}", directory=directory)
    (package,) = directory.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, directory / "root"], check=True)
    include = directory / "root/usr/include"
    for header, source in (("linux/kvm.h", "linux/kvm.h"), ("asm/kvm.h", "x86_64-linux-gnu/asm/kvm.h")):
        target = into / header
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(include / source, target)
    package.unlink()
    shutil.rmtree(directory / "root")


def main() -> None:
    """Fetch what there is and say what was taken for which level."""
    directory = cache_dir() / "apt"
    (directory / "lists/partial").mkdir(parents=True, exist_ok=True)
    lines = [f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n" for suite in SUITES]
    (directory / "sources.list").write_text("".join(lines))
    _apt("apt-get", "update", "-qq", directory=directory)
    versions = _versions(directory)
    for level, release in RELEASES.items():
        version = next((version for version in versions if version.startswith(release)), None)
        if version is not None:
            _take(version, cache_dir() / level, directory)
        print(f"{level}: {version or 'no suite has one'}")


if __name__ == "__main__":
    main()
