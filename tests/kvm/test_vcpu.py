"""KVM_RUN with a scripted guest: exits, interruption, serialisation, hypercalls."""

from __future__ import annotations

import errno

import pytest

from guestmem.cpu.engine import Hypercall, PortIn, PortOut, Shutdown, SliceOver, Stop
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.kvm.exits import (
    Exit,
    HltExit,
    HypercallExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
)
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from tests.kvm.conftest import Bench

K = PAGE_SIZE


class StopsEngine(ScriptedEngine):
    """An engine that makes given stops, and notes what it was answered."""

    def __init__(self, stops: list[Stop]) -> None:
        super().__init__(None, [])  # type: ignore[arg-type]
        self.stops = stops
        self.answers: list[int] = []

    def run(self) -> Stop:
        return self.stops.pop(0)

    def complete(self, value: int) -> None:
        self.answers.append(value)


def with_stops(bench: Bench, *stops: Stop) -> tuple[StopsEngine, list[Exit]]:
    """Run a vCPU through `stops`; the engine, and the exits that came out."""
    handle = bench.vcpu(number=9)
    engine = StopsEngine(list(stops))
    handle.vcpu.engine = engine
    exits = []
    while engine.stops:
        exits.append(handle.run())
    return engine, exits


def test_port_io_comes_out_and_its_answer_goes_in(bench: Bench) -> None:
    handle = bench.vcpu(number=9)
    engine = StopsEngine([PortOut(0x10, 1, 0x41), PortIn(0x20, 2), SliceOver(), PortOut(1, 1, 0)])
    handle.vcpu.engine = engine
    assert handle.run() == IoExit(0x10, 1, True, 0x41)
    exit_ = handle.run()
    assert exit_ == IoExit(0x20, 2, False, 0)
    assert isinstance(exit_, IoExit)
    exit_.data = 0x1234
    handle.run()
    assert engine.answers == [0x1234]


def test_an_answer_is_given_even_if_the_guest_is_not_entered(bench: Bench) -> None:
    """KVM_RUN with immediate_exit completes the pending I/O and returns EINTR."""
    handle = bench.vcpu(number=9)
    engine = StopsEngine([PortIn(0x20, 1), Shutdown()])
    handle.vcpu.engine = engine
    exit_ = handle.run()
    assert isinstance(exit_, IoExit)
    exit_.data = 7
    handle.vcpu.immediate_exit = True
    assert handle.run() == InterruptedExit()
    assert engine.answers == [7]
    handle.vcpu.immediate_exit = False
    assert handle.run() == ShutdownExit()


def test_a_triple_fault_that_waits_comes_before_the_guest_runs(bench: Bench) -> None:
    """Also where KVM_RUN is done at once."""
    vcpu = bench.vcpu()
    engine = vcpu.vcpu.engine = StopsEngine([PortOut(1, 1, 1), PortOut(1, 1, 2)])
    assert vcpu.vcpu.run_at_once() == IoExit(1, 1, True, 1)
    vcpu.vcpu.triple_fault = True
    assert vcpu.vcpu.run_at_once() is None
    assert vcpu.run() == ShutdownExit()
    assert len(engine.stops) == 1, "the guest has not run"


def test_a_pending_signal_interrupts_before_the_guest_runs(bench: Bench) -> None:
    handle = bench.vcpu(Store(0, 1), number=9)

    async def run_with_signal() -> Exit:
        current = bench.host.scheduler.current
        assert current is not None
        current.signal_pending = True
        return await handle.vcpu.run()

    assert bench.run(run_with_signal()) == InterruptedExit(by_signal=True)
    assert handle.engine.done == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (Hypercall(12, (0x1000, 1, 16, 0)), -1000),  # not enabled: -KVM_ENOSYS
        (Hypercall(99, (0, 0, 0, 0)), -1000),
        (Hypercall(12, (0x1000, 1, 16, 0), cpl=3), -1),  # -KVM_EPERM
    ],
)
def test_hypercalls_that_kvm_answers_itself(bench: Bench, call: Hypercall, answer: int) -> None:
    engine, exits = with_stops(bench, call, Shutdown())
    assert engine.answers == [answer % (1 << 64)]
    assert exits == [ShutdownExit()]


@pytest.mark.parametrize("args", [(0x1001, 1, 16, 0), (0x1000, 0, 16, 0), (0x1000, 2**64 - 1, 16, 0)])
def test_map_gpa_range_with_bad_arguments_is_einval_to_the_guest(bench: Bench, args: tuple[int, int, int, int]) -> None:
    bench.vm.enable_hypercalls(12)
    engine, _ = with_stops(bench, Hypercall(12, args), Shutdown())
    assert engine.answers == [-22 % (1 << 64)]


def test_map_gpa_range_is_an_exit_and_its_result_goes_to_the_guest(bench: Bench) -> None:
    bench.vm.enable_hypercalls(12)
    handle = bench.vcpu(number=9)
    engine = StopsEngine([Hypercall(12, (0x1000, 3, 16, 5)), Shutdown()])
    handle.vcpu.engine = engine
    exit_ = handle.run()
    assert exit_ == HypercallExit(12, (0x1000, 3, 16))
    assert isinstance(exit_, HypercallExit)
    exit_.ret = -1
    handle.run()
    assert engine.answers == [(1 << 64) - 1]


def test_a_memory_fault_is_retried_after_the_vmm_converted(bench: Bench) -> None:
    """The implicit conversion of uapi.md section 11."""
    gmem = bench.gmem()
    vcpu = bench.vcpu(Store(K, 5, private=True), Load(K, private=True), number=9)
    exit_ = vcpu.run()
    assert isinstance(exit_, MemoryFaultExit)
    gmem.convert(exit_.gpa, exit_.size, Access.PRIVATE)
    assert vcpu.run() == HltExit()
    assert vcpu.engine.loaded == [5]  # type: ignore[attr-defined]


def test_vcpus_take_turns_and_the_script_sees_their_exits(bench: Bench) -> None:
    gmem = bench.gmem()
    first = bench.vcpu(*(Store(page * K, page) for page in range(4)), number=0)
    second = bench.vcpu(*(Load(page * K) for page in range(4)), Load(0, private=True), number=1)
    exits = []
    for vcpu, exit_ in bench.host.run_vcpus(first, second):
        exits.append((vcpu.vcpu.number, type(exit_).__name__))
        if isinstance(exit_, MemoryFaultExit):
            gmem.convert(0, K, Access.PRIVATE)
    assert sorted(exits) == [(0, "HltExit"), (1, "HltExit"), (1, "MemoryFaultExit")]
    assert len(second.engine.loaded) == 5  # type: ignore[attr-defined]
    assert [gmem.mmap()[page * K] for page in range(1, 4)] == [1, 2, 3]


def test_leaving_the_loop_leaves_no_vcpu_running(bench: Bench) -> None:
    bench.gmem()
    first = bench.vcpu(Load(0, private=True), number=0)
    second = bench.vcpu(*(Load(0) for _ in range(50)), number=1)
    for _ in bench.host.run_vcpus(first, second):
        break
    assert not bench.host.scheduler.parked
    assert second.vcpu.mutex.owner is None
    assert second.run() == HltExit()


def test_mmio_comes_from_the_engine(bench: Bench) -> None:
    class MmioEngine(StopsEngine):
        def emulate_mmio(self, gpa: int, write: bool) -> Stop:
            from guestmem.cpu.engine import MmioRead, MmioWrite

            return MmioWrite(gpa, 4, 0xAB) if write else MmioRead(gpa, 2)

    from guestmem.cpu.engine import Stage2Miss

    handle = bench.vcpu(number=9)
    engine = MmioEngine([Stage2Miss(0x5000, True), Stage2Miss(0x6001), Shutdown()])
    handle.vcpu.engine = engine
    assert handle.run() == MmioExit(0x5000, 4, True, 0xAB)
    exit_ = handle.run()
    assert exit_ == MmioExit(0x6001, 2, False, 0)
    assert isinstance(exit_, MmioExit)
    exit_.data = 0xBEEF
    assert handle.run() == ShutdownExit()
    assert engine.answers == [0xBEEF]


def test_two_vcpus_of_one_number_are_refused(bench: Bench) -> None:
    bench.vcpu(number=3)
    with pytest.raises(Refusal) as caught:
        bench.vcpu(number=3)
    assert (caught.value.errno, caught.value.rule) == (errno.EEXIST, "vcpu.exists")


def test_other_errors_of_a_fault_are_kvm_runs_own(bench: Bench) -> None:
    bench.gmem(pages=512)
    bench.host.pool.capacity = len(bench.host.pool.allocated)
    with pytest.raises(Refusal) as caught:
        bench.guest(Store(0, 1))
    assert caught.value.errno == errno.ENOMEM
