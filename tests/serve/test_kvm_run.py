"""What struct kvm_run says of the exits that protected guests have."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from guestmem.kvm.exits import FailEntryExit, SystemEventExit
from guestmem.serve.kvm_run import EXIT_FAIL_ENTRY, EXIT_SYSTEM_EVENT, KvmRun
from guestmem.uapi.kvm import KVM_SYSTEM_EVENT_SEV_TERM, KVM_SYSTEM_EVENT_TDX_FATAL


@pytest.fixture
def run() -> Iterator[KvmRun]:
    made = KvmRun()
    yield made
    made.close()


def test_a_vcpu_that_hardware_does_not_let_in(run: KvmRun) -> None:
    assert run.write(FailEntryExit("VMRUN", "VMEXIT_INVALID")) == 0
    assert struct.unpack_from("<I", run.memory, 8) == (EXIT_FAIL_ENTRY,)
    assert struct.unpack_from("<QI", run.memory, 32) == ((1 << 64) - 1, 0)


@pytest.mark.parametrize(
    ("type_", "data"), [(KVM_SYSTEM_EVENT_SEV_TERM, (0x100,)), (KVM_SYSTEM_EVENT_TDX_FATAL, tuple(range(16)))]
)
def test_a_guest_that_asks_to_be_ended(run: KvmRun, type_: int, data: tuple[int, ...]) -> None:
    assert run.write(SystemEventExit(type_, data)) == 0
    assert struct.unpack_from("<I", run.memory, 8) == (EXIT_SYSTEM_EVENT,)
    assert struct.unpack_from("<II", run.memory, 32) == (type_, len(data))
    assert struct.unpack_from(f"<{len(data)}Q", run.memory, 40) == data
