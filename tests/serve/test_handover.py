"""Servers one after another: what a client has preserved is there for the next client, or nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from guestmem.native import shim_path
from guestmem.serve import keeper
from tests.serve.conftest import SECONDS, Done

GUESTMEM = (sys.executable, "-m", "guestmem.cli.main")

AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
names = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "guestmem-0", "NOTIFY_SOCKET": sys.argv[2]}
os.execve(sys.argv[3], sys.argv[3:], os.environ | names | {"LISTEN_PID": str(os.getpid())})
"""


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


class Place:
    """A socket, a state directory, a client that was built."""

    def __init__(self, path: Path, client: Path) -> None:
        self.path = path
        self.socket = path / "socket"
        self.state = path / "state"
        self.client = client

    def command(self, *options: str) -> list[str]:
        return [*GUESTMEM, "serve", "--socket", str(self.socket), "--state", str(self.state), *options]

    @contextmanager
    def server(self, *options: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
        self.socket.unlink(missing_ok=True)
        process = subprocess.Popen(
            self.command(*options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        try:
            until(self.socket.exists, process)
            yield process
        finally:
            process.kill()
            process.communicate()

    def end(self, process: subprocess.Popen[str]) -> str:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
        return out

    @contextmanager
    def saved(self, server: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
        """A client whose guest is preserved, as long as the block lasts."""
        ready = self.path / "ready"
        command = [*GUESTMEM, "run", "--connect", str(self.socket), "--", str(self.client), "save", str(ready)]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            until(ready.exists, client)
            yield client
        finally:
            client.kill()
            client.communicate()
            ready.unlink(missing_ok=True)

    def restore(self) -> Done:
        command = [*GUESTMEM, "run", "--connect", str(self.socket), "--", str(self.client), "restore"]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)

    def refused(self, *options: str) -> str:
        done = subprocess.run(self.command(*options), capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 3, done.stdout + done.stderr
        return done.stderr


@pytest.fixture
def place(tmp_path: Path, build: Callable[[str], Path]) -> Iterator[Place]:
    if shim_path() is None:
        pytest.skip("the shim was not built: no compiler at installation")
    made = Place(tmp_path, build("preserved"))
    yield made
    with suppress(OSError):  # whatever a test has left to be kept
        keeper.fetch(made.state).release()


def test_a_guest_goes_on_under_the_next_server(place: Place) -> None:
    with place.server() as first, place.saved(first) as client:
        assert "handed over: 1 sessions" in place.end(first)
        assert client.wait(SECONDS) == -signal.SIGKILL, "its private memory is guarded no more"
    assert {file.name for file in place.state.iterdir()} == {"lock", "keeper", "state"}
    with place.server() as second:
        done = place.restore()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ok 1" in done.stdout
        assert "1 sessions from before" in place.end(second)
    assert {file.name for file in place.state.iterdir()} == {"lock"}


def test_take_over_ends_the_server_that_runs(place: Place) -> None:
    with place.server() as first:
        done = subprocess.run(place.command(), capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 125
        assert f"in use by process {first.pid}" in done.stderr
        with place.saved(first):
            second = subprocess.Popen(place.command("--take-over"), stdout=subprocess.PIPE, text=True)
            try:
                assert second.stdout is not None
                assert "1 sessions from before" in second.stdout.readline()
                assert first.wait(SECONDS) == 0
                done = place.restore()
                assert done.returncode == 0, done.stdout + done.stderr
            finally:
                second.terminate()
                second.communicate(timeout=SECONDS)


def test_what_nobody_retrieves_goes_on_to_the_one_after(place: Place) -> None:
    with place.server() as first, place.saved(first):
        place.end(first)
    with place.server() as second:
        assert "handed over: 1 sessions" in place.end(second)
    with place.server() as third:
        assert place.restore().returncode == 0
        place.end(third)


def test_damage_is_refused_whole_and_nothing_is_lost(place: Place) -> None:
    with place.server() as first, place.saved(first):
        place.end(first)
    path = place.state / "state"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"size":16384', b'"size":16385'))
    assert "check sum" in place.refused()
    path.write_bytes(good.replace(b"version 1", b"version 9"))
    assert "version 9; this guestmem reads 1" in place.refused()
    path.write_bytes(good[:-1])
    assert "bytes where there should be" in place.refused()
    path.unlink()
    assert "not there, though memory was kept" in place.refused()
    path.write_bytes(good)
    assert "of ABI level future" in place.refused("--abi", "v7.4")
    with place.server() as second:
        assert place.restore().returncode == 0
        place.end(second)


def test_memory_that_was_not_kept_is_missed(place: Place) -> None:
    with place.server() as first, place.saved(first):
        place.end(first)
    keeper.fetch(place.state).release()
    assert "memory guestmem-0 was not kept" in place.refused()
    (place.state / "state").unlink()


def test_a_server_without_sessions_leaves_nothing(place: Place) -> None:
    with place.server() as server:
        assert "handed over" not in place.end(server)
    assert {file.name for file in place.state.iterdir()} == {"lock"}


def test_systemd_keeps_the_memory_where_it_is_the_manager(place: Place) -> None:
    """Its side of sd_notify(3) and sd_listen_fds(3), played here."""
    address = place.path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        with place.server(environment={"NOTIFY_SOCKET": str(address)}) as first, place.saved(first):
            place.end(first)
        message, (memfd,), _, _ = socket.recv_fds(manager, 1024, 1)
        assert message == b"FDSTORE=1\nFDNAME=guestmem-0"
        assert not (place.state / "keeper").exists()
        command = [sys.executable, "-c", AS_SYSTEMD, str(memfd), str(address), *place.command()]
        second = subprocess.Popen(command, pass_fds=(memfd,), stdout=subprocess.PIPE, text=True)
        os.close(memfd)
        try:
            until(place.socket.exists, second)
            assert place.restore().returncode == 0
            assert manager.recv(1024) == b"FDSTOREREMOVE=1\nFDNAME=guestmem-0"
        finally:
            second.terminate()
            second.communicate(timeout=SECONDS)


def test_a_static_program_has_no_other_server(
    place: Place, guestmem: Callable[..., Done], build: Callable[..., Path]
) -> None:
    static = place.path / "static"
    source = Path(__file__).parents[1] / "clients" / "preserved.c"
    built = subprocess.run(["gcc", "-static", "-o", static, source], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip("no static libc (libc.a)")
    done = guestmem("--connect", place.socket, "--", static)
    assert done.returncode == 125
    assert "only a server of its own" in done.stderr
