"""The crate kvm-ioctls: its tests, built by cargo from the sources that Debian packages, without a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from tests.vmms.cache import CannotHaveError, quiet

FAIL_ON_LINUX_6_18 = {
    "ioctls::system::tests::test_kvm_getters": "wants four CPUs recommended",
    "ioctls::vcpu::tests::test_get_cpuid": "wants a CPUID back as it was set",
    "ioctls::vcpu::tests::test_run_code": "wants bits in DR7 that a debugger has not set",
    "ioctls::vcpu::tests::test_set_tsc_khz": "wants TSC scaling",
}
"""Tests that also fail on this machine's /dev/kvm, whose answers are ours."""
_RESULT = re.compile(r"^test (\S+) \.\.\. (ok|FAILED)$", re.MULTILINE)


def build_tests(registry: Path, folder: Path) -> Path:
    """Build the test program in `folder`, once; its path. Raises: CannotHaveError."""
    crate = next(registry.glob("kvm-ioctls-*"), None)
    if crate is None:
        raise CannotHaveError(f"no kvm-ioctls in {registry}")
    work = folder / crate.name
    program = folder / f"{crate.name}-tests"
    if program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(crate, work)
    (work / ".cargo").mkdir(exist_ok=True)
    sources = {"crates-io": {"replace-with": "debian"}, "debian": {"directory": str(registry)}}
    (work / ".cargo/config.toml").write_text(
        "".join(f'[source.{name}]\n{key} = "{value}"\n' for name, of in sources.items() for key, value in of.items())
    )
    cargo = ["cargo", "test", "--offline", "--no-run", "--quiet", "--message-format", "json"]
    built = [json.loads(line) for line in quiet(cargo, cwd=work).splitlines() if line.startswith("{")]
    executables = [message["executable"] for message in built if message.get("executable")]
    shutil.copy(executables[0], program)
    return program


def tests_verdict(output: str) -> str:
    """Every test passes that passes on a real kernel."""
    results = dict(_RESULT.findall(output))
    failed = {name for name, result in results.items() if result != "ok"}
    wrong = sorted(failed - FAIL_ON_LINUX_6_18.keys())
    if wrong or len(results) < 50:
        return f"{len(results)} tests, of which these fail here alone: {', '.join(wrong) or 'none'}"
    return ""
