"""The whole house against a dict of pages: provider, KVM and userspace under any sequence of calls (S21).

The model knows nothing of folios, leaves or locks: a page has an access, a cell of content, and may be allocated or
poisoned. Every call's answer is predicted from that, value or rule, and after every call the properties, every room's
own `check()`, and the model's picture of the file must hold.

`GUESTMEM_EXAMPLES` sets how many examples each of the four shards runs (default 1250, so 5,000 together), and turns
the fixed seed off.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

from tests.model.file_calls import FileCalls
from tests.model.guest_calls import GuestCalls
from tests.model.host_calls import HostCalls


class GuestMemory(HostCalls, FileCalls, GuestCalls):
    """Any sequence of all of them."""


EXAMPLES = os.environ.get("GUESTMEM_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 1250),
    stateful_step_count=25,
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=list(HealthCheck),
)


def shard(name: str) -> type:
    """A test class of its own: another fixed seed, and another worker's business."""
    machine: Any = type(name, (GuestMemory,), {})
    case: type = machine.TestCase
    case.settings = SETTINGS  # type: ignore[attr-defined]
    case.__name__ = case.__qualname__ = f"Test{name}"
    return case


TestModelOne = shard("ModelOne")
TestModelTwo = shard("ModelTwo")
TestModelThree = shard("ModelThree")
TestModelFour = shard("ModelFour")
