"""Clients that launch protected guests as a VMM does, and what a refused step of a launch tells its user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guestmem.arch.snp.digest import DIGEST_BYTES, PageType, extend
from guestmem.memory import PAGE_SIZE
from tests.arch.id_blocks import id_auth, id_block
from tests.serve.conftest import Done

Guestmem = Callable[..., Done]
POLICY = 1 << 17


@pytest.fixture
def owners_file(tmp_path: Path) -> Path:
    """The ID block of the guest in snp_launch.c: one page at 0 that begins with an `i`, and no vCPU."""
    digest = extend(bytes(DIGEST_BYTES), PageType.NORMAL, 0, b"i".ljust(PAGE_SIZE, b"\0"))
    block = id_block(digest, POLICY)
    path = tmp_path / "id"
    path.write_bytes(block + id_auth(block))
    return path


def test_an_snp_guest(owners_file: Path, build: Callable[[str], Path], guestmem: Guestmem) -> None:
    done = guestmem("--abi", "future", "--explain", "--", build("snp_launch"), owners_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    for said in (
        "snp_op.not_snp",
        "vmsa_features 1, supported 0x20",
        "call SNP_LAUNCH_START, code POLICY_FAILURE",
        "call SNP_LAUNCH_FINISH, code BAD_MEASUREMENT",
        "call SNP_LAUNCH_FINISH, code BAD_SIGNATURE",
    ):
        assert said in done.stderr, done.stderr


def test_a_td(build: Callable[[str], Path], guestmem: Guestmem) -> None:
    done = guestmem("--abi", "future", "--explain", "--", build("tdx_launch"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not ok" not in done.stdout
    for said in (
        "tdx_op.attributes",
        "tdx_op.cpuid",
        "call TDH.MNG.INIT, code TDX_OPERAND_INVALID|CPUID_CONFIG",
        "call TDH.MR.FINALIZE, code TDX_NO_VCPUS",
        "vcpu.td_state",
    ):
        assert said in done.stderr, done.stderr
