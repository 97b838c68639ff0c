"""`python -m tests.peer.build`: build the foreign test programs outside the repository.

Debian's packages linux-source-6.12 and linux-source-7.3 have the kernel's KVM selftests. What they need of them is
unpacked into a cache directory and built there with the machine's gcc, unmodified. The clients of this repository
(`tests/clients`) and, where somebody has put their text, upstream's newer tests are built beside them. Nothing of
upstream is in the repository.

Exit codes: 0 built; 4 (kselftest's "skip") the kernel's tests need something that this user cannot install, our clients
are built all the same; 1 a compiler refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.suites import Suites

TOOLS = {"gcc": "gcc", "make": "make", "tar": "tar", "xz": "xz-utils"}
HERE = Path(__file__).parent
CLIENTS = HERE.parent / "clients"
SKIP = 4


@dataclasses.dataclass(frozen=True)
class Release:
    """The kernel source of one release; `x86` is what its selftests call the architecture."""

    version: str
    x86: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        return f"linux-source-{self.version}"

    @property
    def wanted(self) -> list[str]:
        return [f"{self.package}/{path}" for path in WANTED]

    def tarball(self, cache: Path) -> Path:
        """Where the package has it, or where it was brought."""
        path = Path("usr/src") / f"{self.package}.tar.xz"
        return Path("/") / path if (Path("/") / path).exists() else cache / path


OLD = Release(
    "6.12",
    "x86_64",
    (
        "guest_memfd_test",
        "guest_print_test",
        "pre_fault_memory_test",
        "set_memory_region_test",
        "x86_64/private_mem_conversions_test",
        "x86_64/private_mem_kvm_exits_test",
        "x86_64/userspace_io_test",
    ),
)
NEW = Release(
    "7.3",
    "x86",
    (
        "coalesced_io_test",
        "demand_paging_test",
        "dirty_log_test",
        "guest_memfd_test",
        "guest_print_test",
        "kvm_page_table_test",
        "memslot_modification_stress_test",
        "memslot_perf_test",
        "mmu_stress_test",
        "pre_fault_memory_test",
        "set_memory_region_test",
        "x86/private_mem_conversions_test",
        "x86/private_mem_kvm_exits_test",
        "x86/sev_dbg_test",
        "x86/sev_init2_tests",
        "x86/sev_migrate_tests",
        "x86/sev_smoke_test",
        "x86/userspace_io_test",
    ),
)

# What `make headers` and the selftests read, of 1.5 GB: 22 MB.
WANTED = (
    "Kbuild",
    "Makefile",
    "arch/x86/Kbuild",
    "arch/x86/Makefile*",
    "arch/x86/entry/syscalls",
    "arch/x86/include",
    "arch/x86/tools",
    "include/uapi",
    "scripts",
    "tools/arch/x86/include",
    "tools/build",
    "tools/include",
    "tools/lib/*.c",
    "tools/scripts",
    "tools/testing/selftests/*.h",
    "tools/testing/selftests/*.mk",
    "tools/testing/selftests/kvm",
    "tools/testing/selftests/rseq",
    "usr",
)

# The flags of the selftests' own Makefile that matter for code that is loaded into a guest: no vector beyond what a
# fresh vCPU has, no stack protector, no position-independent code.
GUEST_FLAGS = (
    *("-std=gnu99", "-O2", "-g", "-Wall", "-march=x86-64-v2", "-D_GNU_SOURCE=", "-DCONFIG_64BIT", "-U_FORTIFY_SOURCE"),
    *("-fno-builtin-memcmp", "-fno-builtin-memcpy", "-fno-builtin-memset", "-fno-builtin-strnlen"),
    *("-fno-stack-protector", "-fno-PIE", "-fno-strict-aliasing"),
)
CLIENT_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def cache_dir() -> Path:
    """Where everything is built: $XDG_CACHE_HOME/guestmem/peer, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "guestmem" / "peer"


def run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    """Run a command quietly; CalledProcessError after its output was shown, if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        done.check_returncode()


def packages_problem() -> str:
    """Install the Debian packages that are missing; "", or what is missing still and how to get it."""
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if not missing:
        return ""
    by_hand = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"missing {', '.join(missing)}; as root: {by_hand}"
    try:
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing])
    except subprocess.CalledProcessError as error:
        return f"{by_hand} failed with {error.returncode}"
    return ""


def bring(release: Release, cache: Path) -> str:
    """Have the tarball of a release; "", or why it cannot be had."""
    if release.tarball(cache).exists():
        return ""
    try:
        suites = Suites(cache / "apt")
        versions = suites.versions(release.package)
        if not versions:
            return f"no suite has {release.package}"
        suites.unpack(release.package, versions[0], cache)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{release.package}: {error}"
    return ""


def tarball_key(release: Release, cache: Path) -> str:
    """What changes when the unpacked tree is of no more use: the tarball, or the list of what is wanted of it."""
    stat = release.tarball(cache).stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {' '.join(release.wanted)}\n"


def unpack(release: Release, cache: Path) -> Path:
    """The kernel tree with its exported headers in `usr/include`; made when the stamp does not fit."""
    tree, stamp = cache / f"linux-{release.version}", cache / f"linux-{release.version}.stamp"
    key = tarball_key(release, cache)
    if stamp.exists() and stamp.read_text() == key:
        return tree
    stamp.unlink(missing_ok=True)
    shutil.rmtree(cache / f"selftests-{release.version}", ignore_errors=True)
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    options = ["--strip-components=1", "--wildcards", "--no-wildcards-match-slash"]
    run(["tar", "-x", "-I", "xz -dT0", "-f", release.tarball(cache), "-C", tree, *options, *release.wanted])
    run(["make", "-s", "ARCH=x86", f"-j{os.cpu_count()}", "headers"], cwd=tree)
    stamp.write_text(key)
    return tree


def build_selftests(release: Release, tree: Path, out: Path) -> list[Path]:
    """The kernel's tests, by the kernel's own Makefile; its lists of programs are overridden, not its rules. Libraries
    of other tests that it names are not here, and none of ours is linked with them: so go on past what fails.

    Raises: subprocess.CalledProcessError if a test is not there in the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    arch = release.x86
    lists = [
        f"TEST_GEN_PROGS_{arch}={' '.join(release.tests)}",
        f"TEST_GEN_PROGS_EXTENDED_{arch}=",
        f"TEST_PROGS_{arch}=",
    ]
    make = ["make", "-s", "-k", "ARCH=x86", f"-j{os.cpu_count()}", f"OUTPUT={out}", *lists]
    done = subprocess.run(make, cwd=tree / "tools/testing/selftests/kvm", capture_output=True, text=True)
    built = [out / name for name in release.tests]
    if not all(path.exists() for path in built):
        sys.stderr.write(done.stdout + done.stderr)
        done.check_returncode()
    return built


def is_older(target: Path, sources: Sequence[Path]) -> bool:
    """Whether `target` is missing or older than any of its sources."""
    return not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime for source in sources)


def build_clients(out: Path) -> list[Path]:
    """The programs of tests/clients; plain C, one file each, with the machine's own headers."""
    out.mkdir(parents=True, exist_ok=True)
    headers = sorted(CLIENTS.glob("*.h"))
    built = []
    for source in sorted(CLIENTS.glob("*.c")):
        target = out / source.stem
        if is_older(target, [source, *headers]):
            run(["gcc", *CLIENT_FLAGS, "-o", target, source])
        built.append(target)
    return built


def build_upstream(text: Path, tree: Path, selftests: Path, out: Path) -> list[Path]:
    """Upstream's newer tests, unmodified, against the 6.12 library and tests/peer/harness.

    Every `*.c` below `text` is one program. An empty list if there is no such directory.
    """
    harness = HERE / "harness"
    ours = sorted(harness.rglob("*.[ch]"))
    library = sorted((selftests / "lib").rglob("*.o"))
    kvm = tree / "tools/testing/selftests/kvm"
    include = [harness / "include", kvm / "include", kvm / "include/x86_64", kvm.parent, kvm.parent / "rseq"]
    include += [tree / "tools/include", tree / "tools/arch/x86/include", tree / "usr/include"]
    built = []
    for source in sorted(text.glob("*.c")):
        out.mkdir(parents=True, exist_ok=True)
        target = out / source.stem
        if is_older(target, [source, *ours, *library]):
            paths = [flag for path in include for flag in ("-I", str(path))]
            run(["gcc", *GUEST_FLAGS, *paths, "-pthread", "-no-pie", "-o", target, source, *ours_c(ours), *library])
        built.append(target)
    return built


def ours_c(files: Sequence[Path]) -> list[Path]:
    """The C files of the harness, without its headers."""
    return [path for path in files if path.suffix == ".c"]


def main() -> None:
    """Build everything that can be built here and print the programs, one a line."""
    parser = argparse.ArgumentParser(description="Build the foreign test programs outside the repository.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="where to build (default: %(default)s)")
    parser.add_argument("--upstream", type=Path, help="a directory with the text of upstream's newer tests")
    options = parser.parse_args()
    cache = options.cache.resolve()
    text = (options.upstream or cache / "upstream-text").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    lock = (cache / "lock").open("w")  # two builds in one cache would take each other's tree away
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        built, missing = [], packages_problem()
        if shutil.which("gcc"):
            built += build_clients(cache / "clients")
        for release in (OLD, NEW):
            missing = missing or bring(release, cache)
            if missing:
                break
            tree, selftests = unpack(release, cache), cache / f"selftests-{release.version}"
            built += build_selftests(release, tree, selftests)
            if release is OLD:  # the harness stands on its library
                built += build_upstream(text, tree, selftests, cache / "upstream")
    except subprocess.CalledProcessError:
        sys.exit(1)
    print(*built, sep="\n")
    if missing:
        print(f"peer: the kernel's tests are not built: {missing}", file=sys.stderr)
        sys.exit(SKIP)


if __name__ == "__main__":
    main()
