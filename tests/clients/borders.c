/*
 * More borders between private and shared pages than the kernel has memory areas for: nearly all of them are used up
 * beforehand. Every page still is what it was made.
 */
#define _GNU_SOURCE
#include "client.h"

enum { PAGES = 400, KEEP_FREE = 60 };

static void convert(int gmem, size_t page, uint64_t attributes) {
    struct kvm_memory_attributes2 arguments = {.offset = page * PAGE, .size = PAGE, .attributes = attributes};

    CHECK(!ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments), "page %zu: errno %d", page, errno);
}

/* Split a mapping until the kernel has no more areas, and give some back. */
static void use_up_areas(void) {
    size_t size = 140000L * PAGE, used = 0;
    char *memory = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    while (!mprotect(memory + used * PAGE, PAGE, PROT_NONE)) used += 2;
    CHECK(errno == ENOMEM, "errno %d", errno);
    munmap(memory + (used - KEEP_FREE) * PAGE, KEEP_FREE * PAGE);
}

static void every_page_is_what_it_was_made(uint8_t *memory, int step) {
    for (size_t page = 0; page < PAGES; page++) {
        bool private = page % step == 1;
        CHECK(access_is_refused(memory + page * PAGE, -1) == private, "page %zu", page);
        if (!private) CHECK(memory[page * PAGE] == (uint8_t)page, "page %zu: %d", page, memory[page * PAGE]);
    }
}

static void more_borders_than_areas(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    int gmem = create_gmem(vm, PAGES * PAGE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    uint8_t *memory = map_shared(gmem, PAGES * PAGE);

    for (size_t page = 0; page < PAGES; page++) memory[page * PAGE] = (uint8_t)page;
    STEP(use_up_areas());
    for (size_t page = 1; page < PAGES; page += 2) STEP(convert(gmem, page, KVM_MEMORY_ATTRIBUTE_PRIVATE));
    STEP(every_page_is_what_it_was_made(memory, 2));
    CHECK(!punch(gmem, 2 * PAGE, PAGE), "errno %d", errno);
    CHECK(!access_is_refused(memory + 2 * PAGE, 2) && memory[2 * PAGE] == 2, "a hole in a shared page closed it");
    for (size_t page = 3; page < PAGES; page += 4) STEP(convert(gmem, page, 0));
    STEP(every_page_is_what_it_was_made(memory, 4));
}

int main(void) {
    open_kvm();
    begin_case();
    more_borders_than_areas();
    end_case("", "more borders than areas");
    return finish();
}
