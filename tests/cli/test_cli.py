"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from guestmem.cli.main import app
from guestmem.host import Host
from guestmem.memory import Access
from guestmem.uapi.rules import RULES

ROOT = pathlib.Path(__file__).parents[2]
run = CliRunner().invoke


def test_demo_runs_a_guest_to_its_end_and_gives_everything_back() -> None:
    result = run(app, ["demo", "--pace", "0"])
    assert result.exit_code == 0, result.output
    assert "two vCPUs counted to 200000" in result.output
    assert result.output.count("  ok   ") == 11
    assert "FAIL" not in result.output
    assert "0x410000-0x420000" in result.output
    assert "every page, inode, VM and identity" in result.output


@pytest.mark.parametrize(("name", "parse"), [("trace.jsonl", json.loads), ("trace.txt", str.split)])
def test_demo_writes_every_event(tmp_path: pathlib.Path, name: str, parse) -> None:  # type: ignore[no-untyped-def]
    trace = tmp_path / name
    assert run(app, ["demo", "--pace", "0", "--trace", str(trace)]).exit_code == 0
    lines = trace.read_text().splitlines()
    assert all(parse(line) for line in lines)
    for event in ("gmem_create", "gmem_convert", "kvm_page_fault", "kvm_hypercall", "gmem_folio_free", "gmem_destroy"):
        assert any(event in line for line in lines), event


def test_demo_fails_loudly_when_the_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own checks can fail: here a conversion to shared that forgets the page's bytes."""
    from guestmem.memory import Inode, PageRange

    whole = Inode.convert

    async def forgetful(self: Inode, pages: PageRange, to: Access) -> None:
        await whole(self, pages, to)
        if to is Access.SHARED:
            await self.punch_hole(pages)

    monkeypatch.setattr(Inode, "convert", forgetful)
    result = run(app, ["demo", "--pace", "0"])
    assert result.exit_code == 1
    assert "FAIL the host reads their bytes in place" in result.output


def test_the_shipped_guest_is_built_from_the_source_beside_it(tmp_path: pathlib.Path) -> None:
    """With the compiler that built it the bytes are equal; with another one it must at least run."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    built = tmp_path / "demo.elf"
    done = subprocess.run([str(ROOT / "examples/guests/build.sh"), str(built)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot build a 64-bit guest here: {done.stderr.decode()[:200]}")
    from guestmem.cli.demo import Screen, Vmm

    with Host() as host:
        vmm = Vmm(host)
        vmm.boot(built.read_bytes())
        for _, exit_ in host.run_vcpus(*vmm.vcpus):
            vmm.handle(exit_)
        assert vmm.output.count("  ok   ") == 11
        assert not vmm.failed
    assert Screen is not None


def test_explain_prints_a_rule_and_all_rules() -> None:
    one = run(app, ["explain", "convert.busy"])
    assert one.exit_code == 0
    assert "EAGAIN" in one.output
    some = run(app, ["explain", "bind"])
    assert "bind.past_end: EINVAL, offset + size is beyond the file" in some.output
    every = run(app, ["explain"])
    assert all(name in every.output for name in RULES)


def test_explain_of_nothing_suggests_something() -> None:
    result = run(app, ["explain", "convert.bussy"])
    assert result.exit_code == 2
    assert "did you mean convert.busy" in result.output
