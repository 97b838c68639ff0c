/* Section R: KVM_SET_USER_MEMORY_REGION2, in the table's order, rows R1-R65. Binding lifetimes are in region_life.c.
 * "Successful binds were deleted again before the next independent row": `try` does that. */
#include "probe.h"

#include <fcntl.h>

#include "region.h"

#define BAD_FD UINT32_MAX
#define SLOT 1
#define TO_2_63 MAX_SIZE
#define MAX_SLOT_SIZE (8 * TIB - PAGE)

int delete_slot(int vm, uint32_t slot)
{
    return set_region(vm, &(struct region2){.slot = slot});
}

int bind_gmem(int vm, uint32_t slot, uint64_t gpa, uint64_t size, int fd, uint64_t offset)
{
    return set_region(
        vm, &(struct region2){
                .slot = slot, .flags = SLOT_GMEM, .gpa = gpa, .size = size, .offset = offset, .fd = (uint32_t)fd});
}

/* One independent row: the answer, and no slot is left behind. */
static void try(const char *id, int vm, struct region2 region)
{
    int result = set_region(vm, &region);
    row_ret(id, result);
    if (result == 0)
        delete_slot(vm, region.slot);
}

/* A bind of 1 MiB of `file` at gpa 0; the arguments after that change it. */
#define BIND(file, ...)                                                                                                \
    (struct region2)                                                                                                   \
    {                                                                                                                  \
        .slot = SLOT, .flags = SLOT_GMEM, .size = MIB, .fd = (uint32_t)(file), __VA_ARGS__                             \
    }

/* gcc warns of a field named twice in an initializer, which is what the macro is for. */
#pragma GCC diagnostic ignored "-Woverride-init"

static void ask_slots_and_flags(int vm, int file)
{
    try("R1", vm, BIND(file, .slot = 32764));
    try("R2", vm, BIND(file, .slot = 0x10000));
    row_ret("R3", set_region(vm, &BIND(file, .slot = 32763)));
    row_ret("R4", delete_slot(vm, 32763));
    try("R5", vm, BIND(file, .flags = SLOT_GMEM | SLOT_LOG_DIRTY));
    try("R6", vm, BIND(file, .flags = SLOT_GMEM | SLOT_READONLY));
    try("R7", vm, BIND(file, .flags = SLOT_GMEM | 1u << 3));
    try("R8", vm, BIND(file, .flags = SLOT_GMEM | 1u << 16));
    try("R9", vm, BIND(BAD_FD, .flags = SLOT_GMEM | SLOT_LOG_DIRTY));
}

static void ask_addresses(int vm, int file)
{
    try("R10", vm, BIND(file, .size = 4097));
    try("R11", vm, BIND(file, .size = 100));
    try("R12", vm, BIND(file, .gpa = 100));
    try("R13", vm, BIND(BAD_FD, .gpa = 100));
    try("R14", vm, BIND(file, .hva = 100));
    try("R15", vm, BIND(file, .hva = 0xffff800000000000));
    try("R16", vm, BIND(file, .hva = 1ul << 48));
    try("R17", vm, BIND(BAD_FD, .hva = 100));
    try("R18", vm, BIND(file, .hva = 0));
    try("R19", vm, BIND(file, .hva = 0x10000));
}

static void ask_offsets(int vm, int file)
{
    try("R20", vm, BIND(file, .offset = 100));
    try("R21", vm, BIND(BAD_FD, .offset = 100));
    try("R22", vm, BIND(file, .offset = -PAGE, .size = 2 * PAGE));
    try("R23", vm, BIND(BAD_FD, .offset = -PAGE, .size = 2 * PAGE));
    try("R24", vm, BIND(BAD_FD, .offset = -PAGE, .size = PAGE));
    try("R25", vm, BIND(file, .offset = 1ul << 63));
    try("R26", vm, BIND(file, .offset = TO_2_63 - PAGE, .size = PAGE));
    try("R27", vm, BIND(file, .offset = TO_2_63, .size = PAGE));
    try("R28", vm, BIND(file, .offset = TO_2_63 - PAGE, .size = 2 * PAGE));
    try("R29", vm, BIND(file, .offset = TO_2_63, .size = MIB));
    try("R30", vm, BIND(file, .offset = 1ul << 63, .size = PAGE));
    try("R31", vm, BIND(file, .offset = 1ul << 62, .size = PAGE));
}

static void ask_limits(int vm, int file)
{
    try("R32", vm, BIND(BAD_FD, .gpa = 1ul << 52));
    try("R33", vm, BIND(file, .gpa = 1ul << 52));
    try("R34", vm, BIND(file));
    try("R35", vm, BIND(file, .gpa = 1ul << 46));
    try("R36", vm, BIND(file, .gpa = 1ul << 51));
    try("R37", vm, BIND(BAD_FD, .size = MAX_SLOT_SIZE));
    try("R38", vm, BIND(BAD_FD, .size = 8 * TIB));
    try("R39", vm, BIND(BAD_FD, .gpa = -PAGE, .size = 2 * PAGE));
    try("R40", vm, BIND(BAD_FD, .gpa = -PAGE, .size = PAGE));
    try("R41", vm, BIND(BAD_FD, .offset = 1ul << 63));
}

/* The real kernel needs 50 s and 16 GiB for this one: a group of its own, which can be left out. */
static void ask_huge(void)
{
    alarm(120);
    int vm = new_vm(), file = new_gmem(vm, 16 * TIB, GMEM_BOTH);
    try("R42", vm, BIND(file, .size = MAX_SLOT_SIZE));
}

static void ask_dup(int vm, int file)
{
    int copy = dup(file);
    row_ret("R43", bind_gmem(vm, 1, 0, MIB, copy, 0));
    row_ret("R44", bind_gmem(vm, 2, 4 * MIB, MIB, file, 0));
    close(copy);
    row_ret("R45", bind_gmem(vm, 2, 4 * MIB, MIB, file, MIB));
    delete_slot(vm, 1);
    delete_slot(vm, 2);
}

static int set_region1(int vm, uint32_t slot, uint32_t flags, uint64_t size, const void *hva)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot, .flags = flags, .memory_size = size, .userspace_addr = (uintptr_t)hva};
    return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void ask_version1(int vm, int file)
{
    void *memory = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (set_region1(vm, SLOT, 0, MIB, memory) < 0)
        stop("KVM_SET_USER_MEMORY_REGION");
    row_ret("R46", delete_slot(vm, SLOT));
    bind_gmem(vm, SLOT, 0, MIB, file, 0);
    row_ret("R47", set_region1(vm, SLOT, 0, 0, NULL));
    bind_gmem(vm, SLOT, 0, MIB, file, 0);
    row_ret("R48", set_region1(vm, SLOT, 0, MIB, NULL));
    delete_slot(vm, SLOT);
    row_ret("R49", delete_slot(vm, SLOT));
    row_ret("R50", set_region(vm, &BIND(file, .size = 0)));
}

static void ask_descriptors(int vm, int file)
{
    int ends[2], other_vm = new_vm(), others = new_gmem(other_vm, FILE_SIZE, GMEM_BOTH);
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    if (pipe(ends) < 0)
        stop("pipe");
    try("R51", vm, BIND(BAD_FD));
    try("R52", vm, BIND(999));
    try("R53", vm, BIND(new_memfd(FILE_SIZE)));
    try("R54", vm, BIND(vm));
    try("R55", vm, BIND(open_kvm()));
    try("R56", vm, BIND(ends[0]));
    try("R57", vm, BIND(open(path, O_PATH | O_CLOEXEC)));
    try("R58", vm, BIND(others));
    try("R59", vm, BIND(others, .offset = 8 * FILE_SIZE));
    try("R60", vm, BIND(file, .offset = FILE_SIZE - MIB + PAGE));
    try("R61", vm, BIND(file, .offset = FILE_SIZE));
    try("R62", vm, BIND(BAD_FD, .offset = FILE_SIZE - MIB + PAGE));
}

static void ask_struct(int vm, int file)
{
    struct region2 padded = BIND(file, .pad1 = 1);
    memset(padded.pad2, 0xff, sizeof(padded.pad2));
    try("R63", vm, padded);
    row_ret("R64", ioctl(vm, SET_REGION2, NULL));
    row_ret("R65", set_region1(vm, SLOT, SLOT_GMEM, MIB, NULL));
}

static void (*const parts[])(int, int) = {
    ask_slots_and_flags, ask_addresses, ask_offsets, ask_limits, ask_dup, ask_version1, ask_descriptors, ask_struct,
};

/* One VM and one file for all the rows, as in the table. */
static void ask_arguments(void)
{
    int vm = new_vm(), file = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
        parts[i](vm, file);
}

static const struct group groups[] = {
    {"arguments", ask_arguments},     {"huge", ask_huge},
    {"sequence", ask_sequence},       {"plain slots", ask_plain_slots},
    {"file closed", ask_file_closed}, {"vm closed", ask_vm_closed},
};
SECTION(region_section, "R", groups);
