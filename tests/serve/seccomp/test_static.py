"""Static clients under `guestmem run`: they pass as dynamic ones do, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.conftest import SECONDS, Done

Build = Callable[..., Path]
Guestmem = Callable[..., Done]

CLIENTS = (
    ("gmem_v618", "v6.18"),
    ("conversions", "v7.4"),
    ("misuse", "v6.18"),
    ("machine", "future"),
    ("huge", "future"),
    ("killed", "future"),
    ("links", "future"),
    ("preserved", "future"),
    ("calls", "v6.18"),
    ("threads", "v6.18"),
    ("exec", "v6.18"),
)
_PTRACE, _SECCOMP, _USERFAULTFD = 101, 317, 323


@pytest.mark.parametrize(("client", "abi"), CLIENTS)
def test_a_static_client_passes(client: str, abi: str, build_static: Build, guestmem: Guestmem) -> None:
    done = guestmem("--abi", abi, "--", build_static(client))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("client", ["calls", "threads", "exec"])
def test_the_same_client_passes_on_a_real_kernel(client: str, build_static: Build) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm")
    done = subprocess.run([build_static(client)], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("client", ["conversions", "threads"])
def test_dynamic_clients_pass_in_this_way_too(client: str, build_static: Build, guestmem: Guestmem) -> None:
    done = guestmem("--abi", "v7.4", "--transport", "seccomp", "--", build_static(client, "-no-pie"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout


def test_explain_says_which_way_was_taken(build_static: Build, guestmem: Guestmem) -> None:
    done = guestmem("--explain", "--", build_static("conversions"))
    assert "is a static program" in " ".join(done.stderr.split())
    done = guestmem("--explain", "--", build_static("conversions", "-no-pie"))
    assert "static" not in done.stderr


@pytest.mark.parametrize("kind", ["-static", "-static-pie"])
def test_exit_codes_and_signals_pass_through(
    kind: str, tmp_path: Path, build_static: Build, guestmem: Guestmem
) -> None:
    build_static("calls")  # skips where it cannot be done
    source, program = tmp_path / "end.c", tmp_path / "end"
    source.write_text(
        "#include <signal.h>\n#include <stdio.h>\n"
        "int main(int n, char **a) { puts(a[n - 1]); fflush(stdout); if (n > 2) raise(SIGTERM); return 37; }\n"
    )
    subprocess.run(["gcc", kind, "-o", program, source], check=True)
    done = guestmem("--", program, "one")
    assert (done.stdout, done.stderr, done.returncode) == ("one\n", "", 37)
    done = guestmem("--", program, "one", "two")
    assert (done.stdout, done.returncode) == ("two\n", -signal.SIGTERM)


def test_without_userfaultfd_private_pages_are_overlaid(build_static: Build) -> None:
    done = run_without(_USERFAULTFD, "--abi", "v7.4", "--", build_static("conversions"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout


@pytest.mark.parametrize(("number", "says"), [(_PTRACE, "ptrace"), (_SECCOMP, "seccomp")])
def test_what_is_refused_is_named(number: int, says: str, build_static: Build) -> None:
    done = run_without(number, "--", build_static("calls"))
    assert done.returncode == 125
    assert says in done.stderr and "not permitted" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_run_inside_of_another_says_why_not(build_static: Build, guestmem: Guestmem) -> None:
    inner = [sys.executable, "-m", "guestmem.cli.main", "run", "--", str(build_static("calls"))]
    done = guestmem("--transport", "seccomp", "--", *inner)
    assert done.returncode == 125
    assert "busy" in done.stderr


def test_a_program_that_cannot_be_executed_says_why(tmp_path: Path, guestmem: Guestmem) -> None:
    program = tmp_path / "broken"
    program.write_bytes(b"#!/no/such/interpreter\n")
    program.chmod(0o755)
    done = guestmem("--transport", "seccomp", "--", program)
    assert done.returncode == 126
    assert "No such file" in done.stderr


def run_without(number: int, *arguments: str | Path) -> Done:
    """`guestmem run` where a system call is refused."""
    without = [sys.executable, "-m", "tests.serve.seccomp.without", str(number)]
    command = [*without, sys.executable, "-m", "guestmem.cli.main", "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("victim", ["client", "command"])
def test_a_kill_leaves_no_process(victim: str, build_static: Build) -> None:
    program = build_static("killed")
    command = [sys.executable, "-m", "guestmem.cli.main", "run", "--", str(program), "wait"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    clients = processes_of(program)
    assert clients
    if victim == "client":
        os.kill(min(clients), signal.SIGKILL)
    else:
        run.kill()
    assert run.wait(SECONDS) == -signal.SIGKILL
    run.stdout.read()  # ends when nobody has it open any more
    run.stdout.close()
    assert not processes_of(program)


def test_a_stopped_client_goes_on(build_static: Build) -> None:
    """Job control: SIGSTOP stops it although it is traced, and SIGCONT lets it go on."""
    program = build_static("killed")
    command = [sys.executable, "-m", "guestmem.cli.main", "run", "--", str(program), "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        first = min(processes_of(program))
        os.kill(first, signal.SIGSTOP)
        os.kill(first, signal.SIGCONT)
        os.kill(first, signal.SIGTERM)
        assert run.wait(SECONDS) == -signal.SIGTERM
    assert not processes_of(program)


def processes_of(program: Path) -> list[int]:
    """Those that run a program, zombies aside."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/exe") == str(program):
                found.append(int(name))
        except OSError:
            continue
    return found
