"""The end of a slice, kicks, and the thread that ticks."""

from __future__ import annotations

import os
import signal
import threading
import time

from guestmem.cpu.engine import Halt, PortOut, SliceOver
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import Memory, run, start_long

LOOP, OUT = b"\xeb\xfe", b"\xe6\x80\xeb\xfc"  # jmp itself; out 0x80, al; jmp back
LIMIT_S = 5.0


def ticks_on(engine: UnicornEngine) -> None:
    began = time.monotonic()
    assert engine.run() == SliceOver()
    assert 3e-4 < time.monotonic() - began < LIMIT_S


def test_a_long_run_ends_and_goes_on(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, LOOP)
    for _ in range(3):
        ticks_on(engine)
    assert engine.block.slices == 3


def test_short_runs_are_left_alone(engine: UnicornEngine, memory: Memory) -> None:
    """Only the run that is still the same at the next tick: of short ones at most some that the machine held up."""
    start_long(engine, memory, OUT)
    stops = [engine.run() for _ in range(5000)]
    assert stops.count(PortOut(0x80, 1, 0)) > 4900


def test_after_a_rest(engine: UnicornEngine, memory: Memory) -> None:
    """The thread parks when nothing runs for a while, and is woken."""
    start_long(engine, memory, LOOP)
    ticks_on(engine)
    time.sleep(0.1)
    ticks_on(engine)


def test_in_a_forked_child(engine: UnicornEngine, memory: Memory) -> None:
    """There the thread is not; the next run starts another."""
    start_long(engine, memory, LOOP)
    ticks_on(engine)
    child = os.fork()
    if not child:
        signal.alarm(10)
        os._exit(0 if engine.run() == SliceOver() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_no_signal_is_taken_by_the_thread(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, LOOP)
    ticks_on(engine)
    taken = []
    before = signal.signal(signal.SIGUSR1, lambda *_: taken.append(threading.current_thread()))
    try:
        for _ in range(50):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1e-4)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert set(taken) == {threading.main_thread()}


def test_a_kick_ends_a_run_soon(engine: UnicornEngine, memory: Memory) -> None:
    """In far less than a slice; each is one stop."""
    start_long(engine, memory, LOOP)
    delays = []
    for _ in range(50):
        kicked: list[float] = []

        def kick(kicked: list[float] = kicked) -> None:
            kicked.append(time.monotonic())
            engine.kick()

        timer = threading.Timer(1e-4, kick)
        timer.start()
        while not kicked:
            engine.run()
        delays.append(time.monotonic() - kicked[0])
        timer.join()
    assert sorted(delays)[len(delays) // 2] < 3e-4


def test_a_kick_before_a_run_is_not_lost(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\xe6\x80\xf4")
    engine.kick()
    assert engine.run() == SliceOver()
    assert engine.run() == PortOut(0x80, 1, 0)
    assert run(engine) == Halt()
