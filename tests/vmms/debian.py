"""Debian packages of any suite, unpacked into a folder: no suite but the machine's own is configured, none installed.

apt-get works on a state folder of its own with an empty list of installed packages, so that what it downloads is
complete, C library included. It asks the mirror that the machine's apt asks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.vmms.cache import CannotHaveError, quiet, stamped

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MAIN = re.compile(r"https?://\S+/debian/?(?=\s)")
_SHELL_ONLY = ("systemd", "passwd", "login", "debconf", "adduser", "libpam-modules", "libpam-runtime")
"""Dependencies of maintainer scripts, which nobody runs here: not unpacked."""


def mirror() -> str:
    """The URI of the main archive that the machine's apt uses. Raises: CannotHaveError."""
    if not shutil.which("apt-get"):
        raise CannotHaveError("no apt-get: this machine is not of Debian")
    listed = quiet(["apt-get", "indextargets", "--format", "$(SITE) "])
    found = _MAIN.search(listed)
    if found is None:
        raise CannotHaveError("apt has no Debian archive configured")
    return found.group().rstrip("/")


class Suite:
    """A suite of the archive, with its own apt state below `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._options = [
            f"-oDir::State={folder}",
            f"-oDir::State::Lists={folder}/lists",
            f"-oDir::State::status={folder}/status",
            f"-oDir::Cache={folder}/cache",
            f"-oDir::Etc::sourcelist={folder}/sources.list",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferencesparts=/dev/null",
            "-oAPT::Sandbox::User=root",
            "-oAPT::Get::List-Cleanup=false",
        ]
        self._is_updated = False

    def _apt(self, program: str, *arguments: str) -> str:
        try:
            return quiet([program, *self._options, *arguments])
        except subprocess.CalledProcessError as error:
            words = [line for line in error.stderr.splitlines() if line.startswith("E:")]
            raise CannotHaveError(f"{self.name}: {words[0] if words else error}") from None

    def _update(self) -> None:
        """Once in a run, and only if something is to be downloaded."""
        if self._is_updated:
            return
        for below in ("lists/partial", "cache/archives/partial"):
            (self.folder / below).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        source = f"deb [signed-by={KEYRING}] {mirror()} {self.name} main\n"
        (self.folder / "sources.list").write_text(source)
        self._apt("apt-get", "update", "-qq")
        self._is_updated = True

    def unpack(self, packages: Sequence[str], root: Path, dependencies: bool) -> dict[str, str]:
        """Unpack packages, and what they need, into `root`; the versions of those asked for.

        Done once: a folder that was unpacked for the same packages is left as it is. Raises: CannotHaveError.
        """

        def download_and_unpack() -> dict[str, str]:
            self._update()
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            for archive in self._download(packages, dependencies):
                if archive.name.partition("_")[0] not in _SHELL_ONLY:
                    quiet(["dpkg-deb", "-x", str(archive), str(root)])
            versions = {name: self._version(name) for name in packages}
            shutil.rmtree(self.folder / "cache/archives")
            return versions

        return stamped(root, f"{self.name} {' '.join(packages)} {dependencies}", download_and_unpack)

    def depends(self, package: str, prefix: str) -> str:
        """The package with that prefix that a meta package depends on, as in linux-image-cloud-amd64."""
        self._update()
        for line in self._apt("apt-cache", "depends", package).splitlines():
            name = line.partition("Depends: ")[2]
            if name.startswith(prefix):
                return name
        raise CannotHaveError(f"{self.name}: {package} depends on no {prefix}*")

    def _download(self, packages: Sequence[str], dependencies: bool) -> list[Path]:
        archives = self.folder / "cache/archives"
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        if dependencies:
            self._apt("apt-get", "install", "-qq", "--download-only", "--no-install-recommends", *packages)
        else:
            # `apt-get download` knows nothing but the current folder.
            uris = self._apt("apt-get", "download", "--print-uris", *packages)
            if not uris.strip():
                raise CannotHaveError(f"{self.name}: no {' '.join(packages)}")
            quiet(["apt-get", *self._options, "download", "-qq", *packages], cwd=archives)
        return sorted(archives.glob("*.deb"))

    def _version(self, package: str) -> str:
        policy = self._apt("apt-cache", "policy", package)
        return policy.partition("Candidate: ")[2].partition("\n")[0]
