/* A VM's memory is replaced while threads of the client write to it. */
#include "client.h"

enum { THREADS = 3, SIZE_MIB = 64 };

static const size_t SIZE = (size_t)SIZE_MIB << 20;
static uint64_t *memory;
static volatile int stop;
static int vm;

struct writer {
    uint64_t number, rounds;
};

static int set_region(void *address, size_t size)
{
    struct region region = {.size = size, .address = (uintptr_t)address};
    return ioctl(vm, SET_REGION, &region);
}

static char *anonymous(size_t size, int flags)
{
    char *address = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    CHECK(address != MAP_FAILED);
    return address;
}

/* Each thread counts in a word of its own of every page. */
static void *write_words(void *argument)
{
    struct writer *writer = argument;
    for (; !stop; writer->rounds++)
        for (size_t page = 0; page < SIZE / PAGE; page++)
            memory[page * 512 + writer->number]++;
    return NULL;
}

/* The last word of the range is left out: there the server leaves its mark. */
static void check_words(const struct writer *writers)
{
    for (size_t page = 0; page < SIZE / PAGE; page++)
        for (int i = 0; i < THREADS; i++)
            CHECK(memory[page * 512 + writers[i].number] == writers[i].rounds);
}

static void writers(void)
{
    struct writer all[THREADS];
    pthread_t threads[THREADS];
    vm = vm_create();
    for (int round = 0; round < 4; round++) {
        stop = 0;
        memory = (uint64_t *)anonymous(SIZE, MAP_NORESERVE);
        if (round % 2)
            madvise(memory, SIZE, MADV_HUGEPAGE);
        for (int i = 0; i < THREADS; i++) {
            all[i] = (struct writer){.number = (uint64_t)i * 7};
            CHECK(!pthread_create(&threads[i], NULL, write_words, &all[i]));
        }
        usleep(20000);
        CHECK(!set_region(memory, SIZE));
        CHECK(((unsigned char *)memory)[SIZE - 1] == 0xff); /* what the server wrote is seen */
        usleep(20000);
        stop = 1;
        for (int i = 0; i < THREADS; i++)
            pthread_join(threads[i], NULL);
        check_words(all);
        CHECK(!munmap(memory, SIZE));
    }
}

/* The kernel writes on behalf of a thread, too. */
static void *read_zeros(void *argument)
{
    int zero = open("/dev/urandom", O_RDONLY);
    for (size_t page = 0; !stop; page = (page + 1) % (SIZE / PAGE))
        CHECK(read(zero, &memory[page * 512], 64) == 64);
    close(zero);
    return argument;
}

static void system_calls(void)
{
    pthread_t thread;
    vm = vm_create();
    memory = (uint64_t *)anonymous(SIZE, 0);
    CHECK(!pthread_create(&thread, NULL, read_zeros, NULL));
    usleep(20000);
    CHECK(!set_region(memory, SIZE));
    usleep(20000);
    stop = 1;
    pthread_join(thread, NULL);
}

/* 64 GiB with a few pages in them cost what the few pages cost. */
static void sparse(void)
{
    size_t size = 64UL << 30;
    struct timespec before, after;
    vm = vm_create();
    char *address = anonymous(size, MAP_NORESERVE);
    for (size_t at = 0; at < size; at += 8UL << 30)
        strcpy(address + at, "kept");
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK(!set_region(address, size));
    clock_gettime(CLOCK_MONOTONIC, &after);
    for (size_t at = 0; at < size; at += 8UL << 30)
        CHECK(!strcmp(address + at, "kept") && !address[at + PAGE]);
    CHECK(after.tv_sec - before.tv_sec < 5);
}

/* Several mappings, several protections, a gap, and a page that only was read. */
static void pieces(void)
{
    vm = vm_create();
    char *address = anonymous(16 * PAGE, 0);
    for (int page = 0; page < 16; page++)
        if (page != 5)
            address[(size_t)page * PAGE] = (char)page;
    CHECK(address[5 * PAGE] == 0);
    CHECK(!mprotect(address + 2 * PAGE, PAGE, PROT_NONE) && !mprotect(address + 3 * PAGE, PAGE, PROT_READ));
    CHECK(!munmap(address + 7 * PAGE, PAGE));
    CHECK(!set_region(address, 16 * PAGE));
    CHECK(address[3 * PAGE] == 3);
    CHECK(!mprotect(address + 2 * PAGE, PAGE, PROT_READ));
    for (int page = 0; page < 16; page++)
        CHECK(page == 5 || page == 7 || address[(size_t)page * PAGE] == page);
}

/* A private mapping of a file keeps what was written to it and what was not. */
static void file_private(void)
{
    vm = vm_create();
    int file = memfd_create("image", 0);
    CHECK(write(file, "on disk", 8) == 8 && !ftruncate(file, 4 * PAGE));
    char *address = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    strcpy(address + PAGE, "written");
    CHECK(!set_region(address, 4 * PAGE));
    CHECK(!strcmp(address, "on disk") && !strcmp(address + PAGE, "written"));
}

/* Static data and the heap are memory, too. */
static void heap(void)
{
    static char data[4 * 4096] __attribute__((aligned(4096)));
    vm = vm_create();
    char *block;
    CHECK(!posix_memalign((void **)&block, PAGE, 8 * PAGE));
    strcpy(data, "data");
    strcpy(block, "heap");
    CHECK(!set_region(data, sizeof(data)) && !set_region(block, 8 * PAGE));
    CHECK(!strcmp(data, "data") && !strcmp(block, "heap"));
    for (int i = 0; i < 1000; i++)
        free(malloc((size_t)i * 100));
}

/* Exit code 77: no huge pages here. */
static void hugetlb(void)
{
    size_t size = 4UL << 20;
    char *address = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (address == MAP_FAILED) {
        puts("no free huge pages of 2 MiB");
        exit(77);
    }
    vm = vm_create();
    strcpy(address + (3UL << 20), "kept");
    CHECK(!set_region(address, size) && !strcmp(address + (3UL << 20), "kept") && !address[5]);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"writers", writers}, {"system_calls", system_calls}, {"sparse", sparse}, {"pieces", pieces},
        {"file_private", file_private}, {"heap", heap}, {"hugetlb", hugetlb}, {NULL, NULL},
    };
    return run_test(tests, argc, argv);
}
