"""What a replay answers: one row for each page size and policy, with samples over the trace. Plain values, for JSON."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from guestmem.memory.interface import Conversion, HugePolicy, Split
from guestmem.simulate.sizes import ORDER_NAMES


class Combination(NamedTuple):
    """A page size with its policies."""

    order: int
    policy: HugePolicy

    @property
    def page_size(self) -> str:
        return ORDER_NAMES[self.order]

    @property
    def policy_name(self) -> str:
        """A file of 4K pages has nothing to split, so no policy."""
        if not self.order:
            return "-"
        return f"{self.policy.split.value}, {self.policy.conversion.value}"

    @property
    def label(self) -> str:
        return f"{self.page_size} {self.policy_name}" if self.order else self.page_size


def combinations(orders: list[int], splits: list[Split], conversions: list[Conversion]) -> list[Combination]:
    """One for each row."""
    found: list[Combination] = []
    for order in orders:
        policies = [HugePolicy(split, conversion) for split in splits for conversion in conversions]
        found += [Combination(order, policy) for policy in (policies if order else [HugePolicy()])]
    return found


class Sample(msgspec.Struct, frozen=True):
    """The state after `events` events of the trace, of which `conversions` converted. Bytes and nanoseconds.

    `folio_bytes` is the memory in folios of each size, `lost` how many huge pages are split now, `vmemmap_given_back`
    what splits hold of what HVO saved at the start. Entries are KVM's. `tlb_reach` is what is behind as many of them as
    a TLB holds, if any is as likely to be in it; it may be more than there is. `cost_ns` is the sum so far.
    """

    events: int
    conversions: int
    shared_bytes: int
    folio_bytes: dict[str, int]
    lost: int
    splits: int
    merges: int
    vmemmap_saved: int
    vmemmap_given_back: int
    leaves: dict[str, int]
    table_bytes: int
    rmp_2m: int
    rmp_4k: int
    tlb_reach: int
    cost_ns: float


class Measured(msgspec.Struct, frozen=True):
    """Of the replay itself: wall and CPU time of the provider's conversions, without that of the users that count; and
    resident memory beyond that of the empty program, at its most at the samples."""

    conversion_us_mean: float
    conversion_cpu_us_mean: float
    conversion_us_most: float
    conversions: int
    seconds: float
    state_bytes: int


class Row(msgspec.Struct, frozen=True):
    """One replay.

    `counts` are of the items of the cost model; `refused` by rule. `splits` and `merges` by the size of the larger
    folio. `most` and `least` are extremes over the whole trace, not only at samples. `cost_ns_per_request` is the cost
    of all but first touches, by conversions and holes. `problems` is what --verify found.
    """

    page_size: str
    policy: str
    conversions: int
    holes: int
    counts: dict[str, int]
    refused: dict[str, int]
    splits: dict[str, int]
    merges: dict[str, int]
    vmemmap_saved_at_start: int
    vmemmap_given_back_most: int
    leaves_most: int
    table_bytes_most: int
    rmp_most: int
    lost_most: int
    tlb_reach_least: int
    cost_ns: dict[str, float]
    cost_ns_total: float
    cost_ns_per_request: float
    samples: list[Sample]
    measured: Measured
    problems: list[str] | None

    @property
    def label(self) -> str:
        return self.page_size if self.policy == "-" else f"{self.page_size} {self.policy}"


class Result(msgspec.Struct, frozen=True):
    """The whole answer. `trace` names the source, `tlb_entries` and `costs_ns` are the model that was used."""

    trace: str
    events: int
    tlb_entries: float
    costs_ns: dict[str, float]
    rows: list[Row]
