"""The command around the client: output, exit code and signals pass through; what went wrong before it says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.conftest import Done

Guestmem = Callable[..., Done]


def test_output_and_exit_code_pass_through(guestmem: Guestmem) -> None:
    done = guestmem("--", "sh", "-c", "echo out; echo err >&2; exit 37")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 37)


def test_input_passes_through(guestmem: Guestmem) -> None:
    assert guestmem("--", "cat", input="line\n").stdout == "line\n"


def test_a_signal_that_kills_the_client_kills_the_command(guestmem: Guestmem) -> None:
    assert guestmem("--", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM


def test_options_of_the_client_are_its_own(guestmem: Guestmem) -> None:
    assert guestmem("--", "echo", "--abi", "nonsense").stdout == "--abi nonsense\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--abi", "v9.9", "--", "true"], 125, "v9.9"),
        (["--", "/no/such/program"], 127, "not found"),
        (["--", "/etc/passwd"], 127, "not found"),
    ],
)
def test_what_cannot_be_run_says_why(arguments: list[str], code: int, says: str, guestmem: Guestmem) -> None:
    done = guestmem(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_names_calls_rules_and_numbers(build: Callable[[str], Path], guestmem: Guestmem) -> None:
    done = guestmem("--abi", "v6.18", "--explain", "--", build("misuse"))
    assert "KVM_CREATE_GUEST_MEMFD -> EINVAL [create.size] size 0" in done.stderr
    assert "KVM_RUN -> ENOTTY [ioctl.wrong_file] on VM, of vCPU" in done.stderr
    assert "not served" not in done.stderr
    assert "not ok" not in done.stdout


def events(trace: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in trace.read_text().splitlines()]


def test_a_client_that_is_killed_leaves_nothing(
    build: Callable[[str], Path], guestmem: Guestmem, tmp_path: Path
) -> None:
    """A child with a VM, a mapped guest_memfd and a vCPU that runs is killed; everything it made is destroyed, while
    its parent and the server live on."""
    traced = tmp_path / "trace.jsonl"
    done = guestmem("--abi", "future", "--trace", traced, "--", build("killed"))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = events(traced)
    made = [event["inode"] for event in seen if event["event"] == "gmem_create"]
    gone = [event["inode"] for event in seen if event["event"] == "gmem_destroy"]
    assert made
    assert sorted(made, key=str) == sorted(gone, key=str)


def test_the_server_goes_when_it_is_told_to(build: Callable[[str], Path]) -> None:
    """SIGTERM is the client's; when that has ended nothing is left, no process and no socket."""
    command = [sys.executable, "-m", "guestmem.cli.main", "run", "--", str(build("killed")), "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == -signal.SIGTERM
    deadline = time.monotonic() + 10
    while session_members(server.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_members(server.pid)


def session_members(session: int) -> list[int]:
    """The processes of a session that are alive."""
    members = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(name))
    return members


def test_a_client_that_lies_harms_nobody(build: Callable[[str], Path], guestmem: Guestmem) -> None:
    """Nonsense on the socket, of every kind that the wire has, beside a client that behaves."""
    liar = Path(__file__).with_name("liar.py")
    good = build("conversions")
    done = guestmem("--", "sh", "-c", f"{sys.executable} {liar} & liar=$!; {good} && wait $liar && {good}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    assert "a bug of guestmem" not in done.stderr, done.stderr
