"""The adapter: bindings, and their image of a range (R18, R19)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from guestmem.cpu.scripted import ScriptedEngine
from guestmem.host import Host
from guestmem.kvm.context import KvmGmemContext
from guestmem.memory import PAGE_SIZE, PageIndex, Range
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType

K = PAGE_SIZE
PAGES = 24
FRAMES = 64

binding = st.tuples(st.integers(0, FRAMES - 1), st.integers(0, PAGES - 1), st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(st.lists(binding, max_size=8), st.integers(0, PAGES - 1), st.integers(1, PAGES))
def test_the_image_of_a_range_is_the_union_of_its_parts_under_the_bindings(
    wanted: list[tuple[int, int, int]], start: int, size: int
) -> None:
    """For random bindings and ranges; what is not bound gives nothing, and windows still pair up."""
    with Host(engine=lambda memory: ScriptedEngine(memory, [])) as host:
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(PAGES * K)
        context = gmem.file.private_data
        assert isinstance(context, KvmGmemContext)
        frames_of: dict[int, int] = {}
        for slot, (frame, first, count) in enumerate(wanted):
            try:
                vm.set_memory_region(slot, frame * K, count * K, gmem=gmem, offset=first * K)
            except Refusal:
                continue
            frames_of.update({first + place: frame + place for place in range(count)})
        pages = Range(PageIndex(start), PageIndex(min(start + size, PAGES)))
        image = {gfn for gfns in context.gfns_of(pages) for gfn in range(gfns.start, gfns.end)}
        assert image == {frames_of[page] for page in range(pages.start, pages.end) if page in frames_of}
        for page in range(PAGES):
            slot_at = context.binding_at(PageIndex(page))
            assert (slot_at is not None) == (page in frames_of)
            assert slot_at is None or slot_at.gfns.start + page - slot_at.pages.start == frames_of[page]
        gmem.punch_hole(start * K, pages.pages * K)
        assert vm.kvm.stage2.window.open == 0
        context.check()
