/*
 * The guest of `guestmem demo`: two vCPUs of a software-protected VM.
 *
 * Its memory is one guest_memfd, private when the first instruction runs. vCPU 0 goes through what a confidential guest
 * does with its pages; vCPU 1 counts with it on one private counter, so that the sum shows whether `lock` is exact.
 */
#include "guest.h"

/* What the VMM must see or do; it answers 1 if it was so. Numbers are pages of DATA. */
enum {
    VMM_READS_PATTERN = 1, /* pages 16..31 are shared now: the host reads the pattern, in place */
    VMM_GETS_SIGBUS = 2,   /* page 0 is private: the host cannot read it */
    VMM_ANSWERS = 3,       /* a question lies in page 16: the host writes its answer into page 17 */
    VMM_PUNCHES = 4,       /* pages 32..63 are not needed: the host punches a hole */
};

enum { DATA_PAGES = 64, SHARED_FIRST = 16, SHARED_PAGES = 16, HOLE_FIRST = 32, HOLE_PAGES = 32 };
enum { ROUNDS = 100000 };

static u8 *const DATA = (u8 *)0x400000;
static u64 counter, done[2];

static u8 pattern(u64 page, u64 offset) { return (u8)(page * 7 + offset * 13 + 1); }

static void fill(u64 first, u64 pages) {
    for (u64 page = first; page < first + pages; page++)
        for (u64 offset = 0; offset < PAGE; offset++) DATA[page * PAGE + offset] = pattern(page, offset);
}

static int intact(u64 first, u64 pages) {
    for (u64 page = first; page < first + pages; page++)
        for (u64 offset = 0; offset < PAGE; offset++)
            if (DATA[page * PAGE + offset] != pattern(page, offset)) return 0;
    return 1;
}

static int zero(u64 first, u64 pages) {
    for (u64 offset = first * PAGE; offset < (first + pages) * PAGE; offset++)
        if (DATA[offset]) return 0;
    return 1;
}

static int vmm(u32 request) {
    outl(VMM_PORT, request);
    return (int)inl(VMM_PORT);
}

static void step(const char *what, int good) {
    print(good ? "  ok   " : "  FAIL ");
    print(what);
    print("\n");
    if (!good) halt();
}

static int same(const u8 *bytes, const char *text) {
    while (*text)
        if (*bytes++ != (u8)*text++) return 0;
    return 1;
}

static void write_text(u8 *bytes, const char *text) {
    while ((*bytes++ = (u8)*text++)) {
    }
}

static void count(u64 me) {
    for (u64 round = 0; round < ROUNDS; round++) fetch_add(&counter, 1);
    __atomic_store_n(&done[me], 1, __ATOMIC_SEQ_CST);
}

static void live(void) {
    u8 *shared = DATA + SHARED_FIRST * PAGE;

    fill(0, DATA_PAGES);
    step("wrote a pattern into 64 private pages", intact(0, DATA_PAGES));
    step("the host gets SIGBUS for one of them", vmm(VMM_GETS_SIGBUS));

    step("converted pages 16-31 to shared by hypercall", !map_gpa_range(shared, SHARED_PAGES, MAP_SHARED));
    step("the host reads their bytes in place", vmm(VMM_READS_PATTERN));

    write_text(shared, "what is the answer?");
    step("the host answered a question through shared pages", vmm(VMM_ANSWERS) && same(shared + PAGE, "42"));

    fill(SHARED_FIRST, SHARED_PAGES);
    step("converted them back to private", !map_gpa_range(shared, SHARED_PAGES, MAP_PRIVATE));
    step("nothing was lost on the way", intact(0, DATA_PAGES));
    step("the host gets SIGBUS again", vmm(VMM_GETS_SIGBUS));

    step("the host punched pages 32-63", vmm(VMM_PUNCHES));
    step("they read as zero, the others are intact", zero(HOLE_FIRST, HOLE_PAGES) && intact(0, HOLE_FIRST));

    count(0);
    while (!__atomic_load_n(&done[1], __ATOMIC_SEQ_CST)) pause();
    print("       two vCPUs counted to ");
    print_number(counter);
    print("\n");
    step("no lock-prefixed increment was lost", counter == 2 * ROUNDS);
}

/* The loader sets RDI to the number of the vCPU and gives each a stack of its own. */
void start(u64 me) {
    if (me == 0)
        live();
    else
        count(1);
    for (;;) halt();
}
