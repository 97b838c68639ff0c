"""The lock order, outermost first, and the error for taking locks against it.

One table for the whole house: an order that is spread over the rooms cannot be read, and an order that cannot be
read is not kept. It is checked at every acquisition, in every mode, so a wrong nesting is found by the first run that
goes through it and not by the first run that deadlocks.

Source: spec/invariants.md section 2, after Documentation/virt/kvm/locking.rst. The specification leaves mmap_lock
unordered against KVM's outer locks; KVM takes it inside slots_lock (populate pins its source there) and nothing takes
the two the other way round, so the order here is a total one. The IOMMU's locks have their place by the same reasoning:
mapping pins (mmap_lock) and looks pages up (invalidate_lock) inside of the address space's lock.
"""

from __future__ import annotations

import enum


class LockClass(enum.IntEnum):
    """A class of locks; a task may only take a class with a greater value than all it holds."""

    KVM_LOCK = 1
    VCPU_MUTEX = 2
    SLOTS_LOCK = 3
    DEVICE_LOCK = 4
    IOAS_LOCK = 5
    MMAP_LOCK = 6
    INVALIDATE_LOCK = 7
    FOLIO_LOCK = 8
    MMU_LOCK = 9
    IO_PAGE_TABLE_LOCK = 10
    PAGE_TABLE_LOCK = 11


class LockOrderViolation(AssertionError):
    """A task took a lock class that is not after every class it holds (property S17)."""

    def __init__(self, task: str, wanted: str, held: list[str]) -> None:
        self.task = task
        self.wanted = wanted
        self.held = held
        super().__init__(f"S17 lock order: task {task!r} takes {wanted} while holding {', '.join(held)}")
