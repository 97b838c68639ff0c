"""CodeWatch on pages that are plain bytes."""

from __future__ import annotations

from guestmem.cpu.code_watch import KNOWN_MAX, LIVE_MAX, CodeWatch


def view(page: bytearray) -> memoryview[int]:
    return memoryview(page)


def test_a_page_that_changes_is_seen_before_a_run() -> None:
    watch, page = CodeWatch(), bytearray(64)
    assert watch.fetched(0x1000, view(page))
    assert watch.unchanged()
    page[3] = 1
    assert not watch.unchanged()


def test_what_the_guest_wrote_during_a_run_is_known() -> None:
    watch, page = CodeWatch(), bytearray(64)
    watch.fetched(0x1000, view(page))
    page[3] = 1
    watch.run_ended()
    assert watch.unchanged()
    page[3] = 2
    assert not watch.unchanged()


def test_after_a_tlb_flush_the_fetch_tells() -> None:
    watch, page = CodeWatch(), bytearray(64)
    watch.fetched(0x1000, view(page))
    watch.tlb_flushed()
    page[3] = 1
    assert watch.unchanged()
    assert not watch.fetched(0x1000, view(page))
    watch.code_flushed()
    assert watch.fetched(0x1000, view(page))


def test_many_pages_are_left_to_the_flush() -> None:
    watch = CodeWatch()
    pages = [bytearray(64) for _ in range(LIVE_MAX + 1)]
    for i, page in enumerate(pages):
        assert watch.fetched(i * 0x1000, view(page))
    pages[0][0] = 1
    assert watch.unchanged()
    watch.tlb_flushed()
    assert not watch.fetched(0, view(pages[0]))


def test_a_limit_to_what_is_remembered() -> None:
    watch, page = CodeWatch(), bytearray(64)
    for i in range(KNOWN_MAX):
        assert watch.fetched(i << 12, view(page))
    assert watch.fetched(0, view(page))
    assert not watch.fetched(KNOWN_MAX << 12, view(page))
    watch.code_flushed()
    assert watch.fetched(KNOWN_MAX << 12, view(page))
