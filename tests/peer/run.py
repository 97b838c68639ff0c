"""`python -m tests.peer.run [NAME...]`: run the foreign test programs, print TAP.

By default each runs under `guestmem run --abi LEVEL`; `--command ''` runs them on the machine's own /dev/kvm, to see
what a real kernel says. A program that answers "skip" (exit code 4) says that the kernel below it lacks what it tests.
A software-protected kernel has all of it, so under guestmem that is a failure of ours; under another command it is a
skip. What this machine cannot offer to any kernel (huge pages, an upstream text that may not be shipped) is a skip.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from tests.peer.build import cache_dir

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
MEMINFO = Path("/proc/meminfo")
THP = Path("/sys/kernel/mm/transparent_hugepage")
OURS = f"{Path(sys.executable).parent / 'guestmem'} run --abi {{abi}} --"
KSFT_SKIP = 4
TAIL = 25  # lines of a failed program's output
GRACE = 2.0  # seconds that helpers of a program that has ended may take to end


@dataclass(frozen=True)
class Program:
    """One program with its arguments, and what it asks of this machine."""

    binary: str  # below the cache directory
    arguments: str = ""
    abi: str = "v6.12"
    huge_pages: int = 0  # of 2 MiB
    thp: bool = False  # transparent huge pages must be built into the kernel
    timeout: float = 120.0  # seconds
    lacks: str = ""  # why it does not pass: what that kernel, or guestmem, does not have

    @property
    def label(self) -> str:
        """What the TAP line calls it, and what a NAME on the command line is looked for in."""
        return f"{self.abi} {self.binary} {self.arguments}".rstrip()


CONVERSIONS = "selftests-6.12/x86_64/private_mem_conversions_test"

DELIVERY = "an exception that MMIO meets while it is delivered is KVM_INTERNAL_ERROR_EMULATION, not _DELIVERY_EV"
NO_SEV = "no VM of type SEV or SEV-ES, no /dev/sev"


def _newer(level: str) -> tuple[Program, ...]:
    """The tests of 7.3 at a level that converts by attributes of the VM, as they do."""
    tests = "selftests-7.3"
    return (
        Program(f"{tests}/guest_memfd_test", abi=level),
        Program(f"{tests}/guest_print_test", abi=level),
        Program(f"{tests}/pre_fault_memory_test", abi=level),
        Program(f"{tests}/set_memory_region_test", abi=level, thp=True, lacks=DELIVERY),
        Program(f"{tests}/x86/userspace_io_test", abi=level),
        Program(f"{tests}/x86/private_mem_kvm_exits_test", abi=level),
        Program(f"{tests}/x86/private_mem_conversions_test", "-n 2 -m 2", abi=level),
        Program(f"{tests}/coalesced_io_test", abi=level),
        *(Program(f"{tests}/x86/sev_{name}", abi=level, lacks=NO_SEV) for name in SEV_TESTS),
    )


SEV_TESTS = ("dbg_test", "init2_tests", "migrate_tests", "smoke_test")
PROGRAMS = (
    Program("selftests-6.12/guest_memfd_test"),
    Program("selftests-6.12/guest_print_test"),
    Program("selftests-6.12/x86_64/userspace_io_test"),
    Program("selftests-6.12/x86_64/private_mem_kvm_exits_test"),
    Program("selftests-6.12/pre_fault_memory_test"),
    Program("selftests-6.12/set_memory_region_test", thp=True),
    Program(CONVERSIONS),
    Program(CONVERSIONS, "-m 2"),
    Program(CONVERSIONS, "-n 2"),
    Program(CONVERSIONS, "-n 4 -m 4"),
    Program(CONVERSIONS, "-s shmem"),
    Program(CONVERSIONS, "-s anonymous_thp", thp=True),
    # 4 MiB: the 2 MiB and 4 KiB that one vCPU tests, rounded up to the size of the backing page.
    Program(CONVERSIONS, "-s anonymous_hugetlb_2mb", huge_pages=2),
    Program(CONVERSIONS, "-s shared_hugetlb", huge_pages=2),
    Program("clients/gmem_v618", abi="v6.18"),
    Program("clients/conversions", abi="v7.4"),
    Program("upstream/guest_memfd_test", abi="v6.18", thp=True),
    Program("upstream/guest_memfd_conversions_test", abi="v7.4"),
    *_newer("v7.3"),
    # Built too and left out: memslot_perf_test and mmu_stress_test, which did not end within a minute.
    Program("selftests-7.3/demand_paging_test", "-b 16M", abi="v7.3"),
    Program("selftests-7.3/dirty_log_test", "-i 3 -I 50", abi="v7.3"),
    Program("selftests-7.3/kvm_page_table_test", "-b 8M -v 1", abi="v7.3"),
    Program("selftests-7.3/memslot_modification_stress_test", "-i 10 -b 8M", abi="v7.3"),
    *_newer("v7.4-vm-attributes"),
    Program("selftests-7.3/guest_memfd_test", abi="v6.18", lacks="6.18 takes a file range whose end is 2**63 (B04)"),
    Program("selftests-7.3/x86/userspace_io_test", abi="v7.4"),
    Program("selftests-7.3/guest_print_test", abi="v7.4"),
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `problem` is "" if it passed, `skip` the reason if it did not run or declined to."""

    seconds: float = 0.0
    problem: str = ""
    skip: str = ""
    declined: bool = False  # the program itself skipped
    output: str = ""


class CannotRunError(Exception):
    """This machine lacks something that no kernel below the program could make up for; the text says what."""


@contextlib.contextmanager
def reserved_huge_pages(count: int) -> Iterator[None]:
    """Have `count` free huge pages of 2 MiB for the duration, then the former number of pages again.

    CannotRunError if they cannot be had; the former number is restored then, too.
    """
    if not count:
        yield
        return
    if "Hugepagesize:       2048 kB" not in MEMINFO.read_text():
        raise CannotRunError("the default huge page is not of 2 MiB")
    total, free = HUGE_PAGES / "nr_hugepages", HUGE_PAGES / "free_hugepages"
    former = int(total.read_text())
    missing = max(0, count - int(free.read_text()))
    if missing and not os.access(total, os.W_OK):
        raise CannotRunError(f"{missing} huge pages missing; only root can reserve them")
    try:
        if missing:
            total.write_text(str(former + missing))
        if int(free.read_text()) < count:
            raise CannotRunError(f"no {count} huge pages of 2 MiB to be had")
        yield
    finally:
        if missing:
            total.write_text(str(former))


def require(program: Program, binary: Path) -> None:
    """CannotRunError if the program or what it needs of the machine is not here."""
    if not binary.exists():
        raise CannotRunError("not built (python -m tests.peer.build)")
    if program.thp and not THP.exists():
        raise CannotRunError("this machine's kernel has no transparent huge pages")


def group_is_alive(group: int, seconds: float) -> bool:
    """Whether a process group still has a process after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.02)


def end_group(group: int) -> None:
    """Kill what is left of a process group that we have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def execute(command: Sequence[str], timeout: float) -> Outcome:
    """Run a command in a session of its own; nothing of it is left when this returns."""
    with tempfile.TemporaryFile(mode="w+", errors="replace") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
            seconds = time.monotonic() - started
            problem = describe(code)
            if group_is_alive(process.pid, GRACE):
                problem = problem or f"left processes behind after {GRACE} s"
        except subprocess.TimeoutExpired:
            code, seconds, problem = -signal.SIGKILL, timeout, f"no end within {timeout:g} s"
        finally:
            end_group(process.pid)
            process.wait()
        output.seek(0)
        text = output.read()
    declined = code == KSFT_SKIP
    return Outcome(seconds, problem, skip_reason(text) if declined else "", declined, text)


def excuse(program: Program, outcome: Outcome) -> Outcome:
    """What a program with a known lack came to: a skip that says it. That it passes is a problem: the lack is gone. So
    is what no lack explains: a hang, a signal, processes left behind."""
    if outcome.problem.startswith(("exit code", "declined")):
        return replace(outcome, problem="", skip=program.lacks, output="")
    if outcome.skip or outcome.problem:
        return outcome
    return replace(outcome, problem=f"passes, and is listed as: {program.lacks}")


def describe(code: int) -> str:
    """What an exit code says; "" for success and for a skip."""
    if code in (0, KSFT_SKIP):
        return ""
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def skip_reason(text: str) -> str:
    """The reason that a kselftest prints with its skip: `1..0 # SKIP - REASON`."""
    reasons = [line.partition("# SKIP")[2] for line in text.splitlines() if "# SKIP" in line]
    return reasons[-1].strip(" -") if reasons else "the program gave no reason"


def attempt(program: Program, cache: Path, command: str) -> Outcome:
    """Run one program under a command; what this machine lacks is a skip."""
    binary = cache / program.binary
    prefix = [word.replace("{abi}", program.abi) for word in shlex.split(command)]
    try:
        require(program, binary)
        with reserved_huge_pages(program.huge_pages):
            return execute([*prefix, str(binary), *shlex.split(program.arguments)], program.timeout)
    except CannotRunError as error:
        return Outcome(skip=str(error))


def report(number: int, program: Program, outcome: Outcome) -> None:
    """One TAP line; after a failure the tail of the program's output as diagnostics."""
    verdict = "not ok" if outcome.problem else "ok"
    skip = f" # SKIP {outcome.skip}" if outcome.skip and not outcome.problem else ""
    print(f"{verdict} {number} - {program.label} ({outcome.seconds:.2f} s){skip}", flush=True)
    if outcome.problem:
        print(f"# {outcome.problem}")
        for line in outcome.output.splitlines()[-TAIL:]:
            print(f"# | {line}")


def end_on_signal(number: int, _frame: FrameType | None) -> None:
    """Let a signal that ends us pass through every `finally`: huge pages and processes are given back."""
    sys.exit(128 + number)


def main() -> None:
    """Run the chosen programs; exit code 1 if one failed, or if one declined under guestmem."""
    parser = argparse.ArgumentParser(description="Run the foreign test programs, print TAP.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="run those whose label contains one of these")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="where they were built (default: %(default)s)")
    parser.add_argument("--command", default=OURS, help="what runs them, '' for nothing (default: %(default)s)")
    parser.add_argument("--timeout", type=float, help="seconds for each program")
    parser.add_argument("--list", action="store_true", help="print the labels and do nothing")
    options = parser.parse_args()
    chosen = [p for p in PROGRAMS if not options.names or any(name in p.label for name in options.names)]
    if options.timeout is not None:
        chosen = [replace(program, timeout=options.timeout) for program in chosen]
    if options.list:
        print(*(program.label for program in chosen), sep="\n")
        return
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, end_on_signal)
    failures = 0
    print(f"TAP version 13\n1..{len(chosen)}")
    for number, program in enumerate(chosen, 1):
        outcome = attempt(program, options.cache.resolve(), options.command)
        if outcome.declined and options.command == OURS:
            outcome = replace(outcome, problem=f"declined: {outcome.skip}")
        if program.lacks and options.command == OURS:
            outcome = excuse(program, outcome)
        report(number, program, outcome)
        failures += bool(outcome.problem)
    if failures:
        print(f"# {failures} of {len(chosen)} failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
