"""The native parts: two shared libraries, and no Python in them. Everything else is in pyproject.toml."""

from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "src/guestmem/native"
CPU = "src/guestmem/cpu/native"
WRAPPED = (
    *("gen_intermediate_code", "translator_loop"),  # native/translate.c
    "cpu_loop_exit_atomic",  # native/fault.c
    *("cpu_watchpoint_address_matches", "cpu_check_watchpoint"),  # native/watch.c
)


class build_plain_library(build_ext):  # noqa: N801 - what setuptools calls its commands
    """The libraries are preloaded or loaded by ctypes, not imported: their names have no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


def unicorn() -> Path:
    """The folder of the package unicorn, which has headers and a static library."""
    spec = find_spec("unicorn")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path("unicorn")


setup(
    cmdclass={"build_ext": build_plain_library},
    ext_modules=[
        # optional: without a compiler the rest still installs; `guestmem doctor` says what is missing
        Extension(
            "guestmem.native.libguestmem_shim",
            sources=sorted(glob(f"{NATIVE}/*.c")),
            depends=sorted(glob(f"{NATIVE}/*.h")),
            extra_compile_args=["-std=gnu11", "-fvisibility=hidden"],
            extra_link_args=["-Wl,-z,now"],
            optional=True,
        ),
        Extension(
            "guestmem.cpu.native.libguestmem_cpu",
            sources=sorted(glob(f"{CPU}/*.c")),
            depends=sorted(glob(f"{CPU}/*.h")),
            include_dirs=[str(unicorn() / "include")],
            extra_objects=[str(unicorn() / "lib" / "libunicorn.a")],
            extra_compile_args=["-std=gnu11", "-O2", "-fms-extensions", "-fvisibility=hidden"],
            extra_link_args=[
                *(f"-Wl,--wrap={name}_x86_64" for name in WRAPPED),
                "-Wl,--exclude-libs,ALL",
                "-Wl,-Bsymbolic",
                "-Wl,--gc-sections",
                "-Wl,-z,now",
                "-Wl,--strip-all",
                "-lm",
                "-lpthread",
            ],
            optional=True,
        ),
    ],
)
