"""Whole clients, each with the errno and the bytes that the kernel gives; on the machine's own /dev/kvm as well."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.conftest import SECONDS, Done

NATIVE = ("gmem_v618", "misuse", "machine", "user_memory")
PROTECTED = ("snp", "snp_ap", "tdx")
OURS = (
    ("gmem_v618", "v6.18"),
    ("gmem_v618", "v7.3"),
    ("conversions", "v7.4"),
    ("conversions", "future"),
    ("misuse", "v6.18"),
    ("misuse", "future"),
    ("machine", "v6.18"),
    ("machine", "future"),
    ("user_memory", "v6.18"),
    ("user_memory", "future"),
    ("borders", "future"),
    ("links", "future"),
    ("snp", "future"),
    ("snp_ap", "future"),
    ("snp_dma", "future"),
    ("tdx", "future"),
    ("preserved", "future"),
)


@pytest.mark.parametrize(("client", "abi"), OURS)
def test_a_client_passes_under_guestmem_run(
    client: str, abi: str, build: Callable[..., Path], guestmem: Callable[..., Done]
) -> None:
    done = guestmem("--abi", abi, "--", build(client))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("client", PROTECTED)
def test_a_static_client_launches_a_protected_guest(
    client: str, build: Callable[..., Path], guestmem: Callable[..., Done]
) -> None:
    done = guestmem("--", build(client, "-static"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout and "# SKIP" not in done.stdout


@pytest.mark.parametrize("client", NATIVE)
def test_the_same_client_passes_on_a_real_kernel(client: str, build: Callable[[str], Path]) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm")
    done = subprocess.run([build(client)], capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode == 4:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout


def test_two_clients_at_once_under_one_server(build: Callable[[str], Path], guestmem: Callable[..., Done]) -> None:
    first, second = build("conversions"), build("machine")
    done = guestmem("--", "sh", "-c", f"{first} & one=$!; {second} && wait $one")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
