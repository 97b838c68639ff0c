/* Section R, rows R66-R102: slots one after the other, plain slots, and what outlives a closed file or VM. */
#include "region.h"
#include "probe.h"

#define BAD_FD (-1)

struct sequence {
    int vm, file, other;
    uint64_t anonymous;
};

/* Slot 0 exists: gpa 0, 1 MiB, offset 0 of the file. */
static void ask_same_slot(const struct sequence *on)
{
    struct region2 again = {.flags = SLOT_GMEM, .size = MIB, .fd = (uint32_t)on->file};
    row_ret("R66", set_region(on->vm, &again));
    row_ret("R67", set_region(on->vm, &again));
    row_ret("R68", bind_gmem(on->vm, 0, 0, MIB, BAD_FD, 0));
    row_ret("R69", bind_gmem(on->vm, 0, 4 * MIB, MIB, on->file, 0));
    row_ret("R70", bind_gmem(on->vm, 0, 0, MIB / 2, on->file, 0));
    row_ret("R71", bind_gmem(on->vm, 0, 0, MIB, on->file, MIB));
    again.hva = on->anonymous;
    row_ret("R72", set_region(on->vm, &again));
}

static void ask_overlaps(const struct sequence *on)
{
    row_ret("R73", bind_gmem(on->vm, 1, 16 * MIB, MIB, on->file, 0));
    row_ret("R74", bind_gmem(on->vm, 1, 16 * MIB, MIB, on->file, MIB - PAGE));
    row_ret("R75", bind_gmem(on->vm, 1, 16 * MIB, MIB, on->file, MIB));
    row_ret("R76", bind_gmem(on->vm, 2, MIB / 2, MIB, on->other, 0));
    row_ret("R77", bind_gmem(on->vm, 2, MIB / 2, MIB, BAD_FD, 0));
    row_ret("R78", bind_gmem(on->vm, 2, MIB / 2, MIB, on->other, 100));
    row_ret("R79", bind_gmem(on->vm, 2, MIB / 2, MIB, on->other, 8 * FILE_SIZE));
    struct region2 plain = {.slot = 2, .gpa = MIB / 2, .size = MIB, .hva = on->anonymous};
    row_ret("R80", set_region(on->vm, &plain));
    struct region2 readonly = {
        .slot = 2, .flags = SLOT_GMEM | SLOT_READONLY, .gpa = MIB / 2, .size = MIB, .fd = (uint32_t)on->other};
    row_ret("R81", set_region(on->vm, &readonly));
    row_ret("R82", bind_gmem(on->vm, 2, MIB, MIB, on->other, 0));
}

static void ask_deletes(const struct sequence *on)
{
    static uint64_t bitmap[MIB / PAGE / 64];
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bitmap};
    row_ret("R83", ioctl(on->vm, KVM_GET_DIRTY_LOG, &log));
    row_ret("R84", delete_slot(on->vm, 0));
    row_ret("R85", delete_slot(on->vm, 0));
    row_ret("R86", bind_gmem(on->vm, 3, 32 * MIB, MIB, on->file, 0));
    row_ret("R87", set_region(on->vm, &(struct region2){.slot = 3, .flags = SLOT_GMEM}));
    row_ret("R88", bind_gmem(on->vm, 1, 100 * MIB, 0, BAD_FD, 0));
}

static uint64_t anonymous(size_t size)
{
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        stop("mmap");
    return (uintptr_t)map;
}

void ask_sequence(void)
{
    int vm = new_vm();
    struct sequence on = {vm, new_gmem(vm, FILE_SIZE, GMEM_BOTH), new_gmem(vm, FILE_SIZE, GMEM_BOTH),
                          anonymous(2 * MIB)};
    ask_same_slot(&on);
    ask_overlaps(&on);
    ask_deletes(&on);
}

void ask_plain_slots(void)
{
    int vm = new_vm(), file = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    struct region2 plain = {.slot = 7, .size = MIB, .hva = anonymous(MIB)}, flagged = plain;
    flagged.flags = SLOT_GMEM;
    flagged.fd = (uint32_t)file;
    row_ret("R89", set_region(vm, &plain));
    row_ret("R90", set_region(vm, &flagged));
    row_ret("R91", set_region(vm, &plain));
    struct region2 garbage = {.slot = 8, .gpa = 16 * MIB, .size = MIB, .hva = plain.hva, .offset = 12345, .fd = 777};
    row_ret("R92", set_region(vm, &garbage));
    bind_gmem(vm, 9, 32 * MIB, MIB, file, 0);
    row_ret("R93", set_region(vm, &(struct region2){.slot = 9, .gpa = 32 * MIB, .size = MIB}));
    row_ret("R94", set_region(vm, &(struct region2){.slot = 9, .flags = SLOT_LOG_DIRTY, .gpa = 32 * MIB, .size = MIB}));
}

void ask_file_closed(void)
{
    int vm = new_vm(), file = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    bind_gmem(vm, 0, 0, MIB, file, 0);
    close(file);
    file = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    row_ret("R95", bind_gmem(vm, 0, 0, MIB, file, 0));
    row_ret("R96", delete_slot(vm, 0));
    row_ret("R97", bind_gmem(vm, 0, 0, MIB, file, 0));
}

void ask_vm_closed(void)
{
    int vm = new_vm(), file = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    bind_gmem(vm, 0, 0, MIB, file, 0);
    close(vm);
    row_ret("R98", populate(file, 0, PAGE));
    char *map = map_shared(file, FILE_SIZE);
    row_touch("R99", touch_write(map, 'x'), map);
    row_ret("R100", punch(file, 0, PAGE));
    row_touch("R101", touch_read(map), map);
    row_ret("R102", bind_gmem(new_vm(), 0, 0, MIB, file, 0));
}
