"""The coroutine core: tasks, the primitives they wait on, and the policy that decides who runs.

Every `await` in guestmem ends here. Serving and scripts run under `Fifo`; a checker hands in its own `Policy`.
"""

from guestmem.sched.counts import RefCount, SeqCount
from guestmem.sched.fingerprint import Fingerprinter, Rules, Walk, fingerprint
from guestmem.sched.lock_order import LockClass, LockOrderViolation
from guestmem.sched.locks import AllOf, Lock, RwLock
from guestmem.sched.policy import Fifo, Policy
from guestmem.sched.scheduler import Deadlock, Operation, Scheduler, Task, park
from guestmem.sched.srcu import Srcu
from guestmem.sched.timers import Clock, ManualClock, MonotonicClock, Timer, Timers
from guestmem.sched.waitqueue import WaitQueue

__all__ = [
    "AllOf",
    "Clock",
    "Deadlock",
    "Fifo",
    "Fingerprinter",
    "Lock",
    "LockClass",
    "LockOrderViolation",
    "ManualClock",
    "MonotonicClock",
    "Operation",
    "Policy",
    "RefCount",
    "Rules",
    "RwLock",
    "Scheduler",
    "SeqCount",
    "Srcu",
    "Task",
    "Timer",
    "Timers",
    "WaitQueue",
    "Walk",
    "fingerprint",
    "park",
]
