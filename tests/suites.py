"""Packages of newer Debian suites. This machine's apt is not changed: lists and packages go to a directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

SUITES = ("trixie", "trixie-backports", "forky", "sid")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Suites:
    """What the suites have. Raises, in every call: FileNotFoundError where there is no apt; CalledProcessError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "lists/partial").mkdir(parents=True, exist_ok=True)
        lines = [f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n" for suite in SUITES]
        (directory / "sources.list").write_text("".join(lines))
        self._apt("apt-get", "update", "-qq")

    def versions(self, package: str) -> list[str]:
        """Those of a package, newest first."""
        rows = self._apt("apt-cache", "madison", package).splitlines()
        return [row.split("|")[1].strip() for row in rows]

    def unpack(self, package: str, version: str, into: Path) -> None:
        """Bring a package and unpack it."""
        self._apt("apt-get", "download", "-qq", f"{package}={version}")
        (file,) = self._directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", file, into], check=True)
        file.unlink()

    def _apt(self, tool: str, *arguments: str) -> str:
        options = {
            "Dir::Etc::sourcelist": self._directory / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self._directory / "lists",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
        }
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        command = [tool, *flags, *arguments]
        return subprocess.run(command, cwd=self._directory, capture_output=True, text=True, check=True).stdout
