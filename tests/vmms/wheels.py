"""Packages of PyPI that have a VMM inside, downloaded by pip and unpacked; nothing of them is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.vmms.cache import CannotHaveError, quiet, stamped

_EXECUTABLE = 0o111


def unpack_wheels(packages: Sequence[str], folder: Path, python: str = "") -> dict[str, str]:
    """Unpack wheels side by side into `folder`, once; their versions. `python`: of another version than this one.

    Raises: CannotHaveError.
    """

    def download_and_unpack() -> dict[str, str]:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "wheels").mkdir(parents=True)
        other = ["--python-version", python, "--ignore-requires-python"] if python else []
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", *other]
        try:
            quiet([*pip, "-d", str(folder / "wheels"), *packages])
        except subprocess.CalledProcessError as error:
            words = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
            raise CannotHaveError(f"PyPI: {words[-1] if words else error}") from None
        versions = {}
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            name, version = wheel.name.split("-")[:2]
            versions[name.replace("_", "-")] = version
            _unpack(wheel, folder)
        shutil.rmtree(folder / "wheels")
        return versions

    return stamped(folder, f"{' '.join(packages)} {python}", download_and_unpack)


def _unpack(wheel: Path, folder: Path) -> None:
    """With the modes of the files, which zipfile forgets."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = Path(archive.extract(member, folder))
            if member.external_attr >> 16 & _EXECUTABLE:
                path.chmod(0o755)
