"""The native part: one shared library, and no Python in it. Everything else is in pyproject.toml."""

from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "src/guestmem/native"


class build_plain_library(build_ext):  # noqa: N801 - what setuptools calls its commands
    """The library is preloaded, not imported: its name has no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


setup(
    cmdclass={"build_ext": build_plain_library},
    ext_modules=[
        Extension(
            "guestmem.native.libguestmem_shim",
            sources=sorted(glob(f"{NATIVE}/*.c")),
            depends=sorted(glob(f"{NATIVE}/*.h")),
            extra_compile_args=["-std=gnu11", "-fvisibility=hidden"],
            extra_link_args=["-Wl,-z,now"],
            optional=True,  # without a compiler the rest still installs; `guestmem doctor` says what is missing
        )
    ],
)
