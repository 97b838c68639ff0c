"""One row: a trace against one page size and policy.

Each event that is a cause is done to the provider's own files (file.py); what the provider then splits, merges, tells
and takes is counted, and the cost model says what that would have taken a kernel. What the provider refuses is counted
by rule and the replay goes on: that a split finds no memory for its struct pages is an answer too.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from guestmem.memory import Access, PageIndex, PageRange, Range
from guestmem.memory.pages import PAGE_SIZE
from guestmem.simulate.backing import NoBacking
from guestmem.simulate.costs import FIRST_TOUCHES, Costs
from guestmem.simulate.file import ReplayedFile
from guestmem.simulate.leaves import NONE, Entries
from guestmem.simulate.machine import Machine, resident_bytes
from guestmem.simulate.row import Combination, Measured, Row, Sample
from guestmem.simulate.sizes import ORDER_NAMES
from guestmem.simulate.source import Replayable, Source, Survey
from guestmem.simulate.spent import NO_TIME, Spent
from guestmem.trace import Refusal
from guestmem.trace import events as event

Progress = Callable[[int], None]
"""Told how many events are done, now and then."""

_PROGRESS_EVERY = 2000


class Replay:
    """`samples` points are taken; `spare` is as for Machine; with `verify` the end is held against the start."""

    def __init__(
        self,
        source: Source,
        survey: Survey,
        combination: Combination,
        costs: Costs,
        *,
        samples: int = 100,
        spare: int | None = None,
        verify: bool = False,
    ) -> None:
        self._source = source
        self._survey = survey
        self._combination = combination
        self._costs = costs
        self._verify = verify
        gc.collect()
        self._resident = resident_bytes()
        self._machine = Machine(combination, survey, spare)
        self._vmemmap = self._machine.hugetlb.vmemmap
        self._start = self._books()
        self._saved_at_start = self._vmemmap.saved
        self._moved_at_start = (self._vmemmap.restored, self._vmemmap.optimised)
        self._files: dict[int, ReplayedFile] = {}
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._gone = _Gone()
        self._sample_at = {survey.events * point // samples for point in range(1, samples + 1)}
        self._samples: list[Sample] = []
        self._most: Counter[str] = Counter()
        self._reach_least = 0
        self._conversions = self._holes = 0
        self._spent = NO_TIME
        self._ns_most = self._measured = 0

    def run(self, progress: Progress = lambda done: None) -> Row:
        """The whole trace. Raises: what reading it raises."""
        began = time.perf_counter()
        for number, each in enumerate(self._source.events(), 1):
            try:
                self._apply(each)
            except Refusal as refusal:
                self._refused[refusal.rule] += 1
            self._note_extremes()
            if number in self._sample_at:
                self._sample(number)
            if not number % _PROGRESS_EVERY:
                progress(number)
        seconds = time.perf_counter() - began
        row = self._row(seconds)
        return msgspec.structs.replace(row, problems=self._problems()) if self._verify else row

    def _apply(self, each: Replayable) -> None:
        """Raises: Refusal."""
        if isinstance(each, event.GmemCreate):
            self._files[each.inode] = ReplayedFile(self._machine, each, self._counts, self._note_conversion)
            return
        file = self._files.get(each.inode)
        if file is None:  # its creation was refused
            return
        match each:
            case event.GmemDestroy():
                self._close(each.inode)
            case event.GmemFault():
                file.touch(each)
            case event.GmemConvert():
                self._conversions += 1
                file.convert(_pages(each), Access(each.to))
            case event.GmemFolioFree() | event.GmemZeroRange():
                self._holes += 1
                file.punch(_pages(each))
            case event.GmemFolioAlloc():
                file.allocate(_pages(each))
            case event.KvmUnbind():
                file.unbind(_pages(each))

    def _close(self, inode: int) -> None:
        file = self._files.pop(inode)
        file.destroy()
        self._gone.add(file)

    def _note_conversion(self, took: Spent) -> None:
        self._spent = self._spent.plus(took)
        self._ns_most = max(self._ns_most, took.wall)
        self._measured += 1

    # State

    @property
    def _entries(self) -> Entries:
        total = NONE
        for file in self._files.values():
            total = total.plus(file.entries)
        return total

    def _note_extremes(self) -> None:
        entries = self._entries
        most = self._most
        for name, value in (
            ("given back", self._saved_at_start - self._vmemmap.saved),
            ("leaves", entries.leaves),
            ("tables", entries.tables),
            ("rmp", entries.rmp),
            ("lost", sum(file.lost for file in self._files.values())),
        ):
            if value > most[name]:
                most[name] = value
        if entries.leaves:
            reach = self._reach(entries)
            self._reach_least = min(self._reach_least or reach, reach)

    def _reach(self, entries: Entries) -> int:
        """Bytes behind as many leaves as a TLB holds, if all leaves are as likely to be in it."""
        return int(entries.mapped_pages * PAGE_SIZE * self._costs.tlb_entries / entries.leaves) if entries.leaves else 0

    def _totals(self) -> _Gone:
        """What has been counted by all files, those that are gone included."""
        total = self._gone.copy()
        for file in self._files.values():
            total.add(file)
        return total

    def _items(self, totals: _Gone) -> dict[str, int]:
        """What the cost model charges for."""
        counts = self._counts.copy()
        counts["invalidation"] = totals.told
        counts["flush"] += totals.flushes
        counts["zap"] += totals.zapped
        counts["zero"] = totals.zeroed
        counts["split"] = _parts(totals.splits)
        counts["merge"] = _parts(totals.merges)
        counts["vmemmap_restore"] = self._vmemmap.restored - self._moved_at_start[0]
        counts["vmemmap_optimise"] = self._vmemmap.optimised - self._moved_at_start[1]
        return {name: counts[name] for name in self._costs.items}

    def _sample(self, number: int) -> None:
        totals = self._totals()
        entries = self._entries
        folios: Counter[int] = Counter()
        shared = 0
        for file in self._files.values():
            statistics = file.inode.statistics()
            folios.update(statistics.folios)
            shared += file.inode.pages - statistics.private
        self._most["resident"] = max(self._most["resident"], resident_bytes() - self._resident)
        self._samples.append(
            Sample(
                events=number,
                conversions=self._conversions,
                shared_bytes=shared * PAGE_SIZE,
                folio_bytes={name: folios[order] * PAGE_SIZE << order for order, name in ORDER_NAMES.items()},
                lost=sum(file.lost for file in self._files.values()),
                splits=sum(totals.splits.values()),
                merges=sum(totals.merges.values()),
                vmemmap_saved=self._vmemmap.saved * PAGE_SIZE,
                vmemmap_given_back=(self._saved_at_start - self._vmemmap.saved) * PAGE_SIZE,
                leaves={"4k": entries.leaves_4k, "2m": entries.leaves_2m, "1g": entries.leaves_1g},
                table_bytes=entries.tables * PAGE_SIZE,
                rmp_2m=entries.rmp_2m,
                rmp_4k=entries.rmp_4k,
                tlb_reach=self._reach(entries),
                cost_ns=sum(self._costs.total(self._items(totals)).values()),
            )
        )

    # The end

    def _books(self) -> tuple[object, ...]:
        """Every count of the machine that must be at its end what it was at its start."""
        return self._machine.pool.statistics(), self._machine.hugetlb.statistics(), self._vmemmap.saved

    def _problems(self) -> list[str]:
        """What the end of the trace left behind, then what closing every file did not bring back."""
        found = [f"guest_memfd {number}: {what}" for number, file in self._files.items() for what in file.problems()]
        if self._vmemmap.saved != self._saved_at_start:
            found.append(f"{self._saved_at_start - self._vmemmap.saved:,} pages of vmemmap are not saved again")
        for number in list(self._files):
            self._close(number)
        for what, now, then in zip(("pool", "huge pages", "vmemmap"), self._books(), self._start, strict=True):
            if now != then:
                found.append(f"{what}: {now} and not {then} after every file was closed")
        return found

    def _row(self, seconds: float) -> Row:
        totals = self._totals()
        counts = self._items(totals)
        cost = self._costs.total(counts)
        of_requests = sum(nanoseconds for name, nanoseconds in cost.items() if name not in FIRST_TOUCHES)
        return Row(
            page_size=self._combination.page_size,
            policy=self._combination.policy_name,
            conversions=self._conversions,
            holes=self._holes,
            counts=counts,
            refused=dict(self._refused),
            splits=_by_name(totals.splits),
            merges=_by_name(totals.merges),
            vmemmap_saved_at_start=self._saved_at_start * PAGE_SIZE,
            vmemmap_given_back_most=self._most["given back"] * PAGE_SIZE,
            leaves_most=self._most["leaves"],
            table_bytes_most=self._most["tables"] * PAGE_SIZE,
            rmp_most=self._most["rmp"],
            lost_most=self._most["lost"],
            tlb_reach_least=self._reach_least,
            cost_ns=cost,
            cost_ns_total=sum(cost.values()),
            cost_ns_per_request=of_requests / max(counts["request"], 1),
            samples=self._samples,
            measured=Measured(
                conversion_us_mean=self._spent.wall / max(self._measured, 1) / 1000,
                conversion_cpu_us_mean=self._spent.cpu / max(self._measured, 1) / 1000,
                conversion_us_most=self._ns_most / 1000,
                conversions=self._measured,
                seconds=seconds,
                state_bytes=self._most["resident"],
            ),
            problems=None,
        )


class _Gone:
    """Sums of what files counted, which outlive them."""

    def __init__(self) -> None:
        self.told = self.flushes = self.zapped = self.zeroed = 0
        self.splits: Counter[int] = Counter()
        self.merges: Counter[int] = Counter()

    def add(self, file: ReplayedFile) -> None:
        for user in file.users():
            self.told += user.told
            self.flushes += user.flushes
            self.zapped += user.zapped
        assert isinstance(file.inode.backing, NoBacking)
        self.zeroed += file.inode.backing.zeroed
        statistics = file.inode.statistics()
        self.splits.update(statistics.splits)
        self.merges.update(statistics.merges)

    def copy(self) -> _Gone:
        other = _Gone()
        other.__dict__.update(self.__dict__)
        other.splits, other.merges = self.splits.copy(), self.merges.copy()
        return other


def _pages(
    ranged: event.GmemConvert | event.GmemFolioFree | event.GmemZeroRange | event.GmemFolioAlloc | event.KvmUnbind,
) -> PageRange:
    return Range(PageIndex(ranged.start), PageIndex(ranged.end))


def _parts(folios: Counter[int]) -> int:
    """Folios made by splitting, or used up by merging: 512 for each step, from 1G to 2M and from 2M to 4K."""
    return sum(folios.values()) * 512


def _by_name(folios: Counter[int]) -> dict[str, int]:
    return {ORDER_NAMES[order]: count for order, count in sorted(folios.items(), reverse=True)}
