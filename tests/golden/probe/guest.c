/* Section G: guest runs and pre-fault. See machine.c for the guest's program: it reads, tells what it read on port
 * 0x10, writes 0x77, tells what it reads then on port 0x11, and halts. */
#include "machine.h"

static char *anonymous_page(unsigned char value)
{
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    touch_write(page, value);
    return page;
}

static void row_next(const char *id, const struct machine *machine)
{
    row(id, "%s", next_exit(machine));
}

static void row_byte(const char *id, const void *byte)
{
    row(id, "0x%x", touch_read(byte).value);
}

static void ask_own_mapping(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 0x41);
    bind_data(&machine, fd, map);
    row_next("G1", &machine);
    row_next("G2", &machine);
    row_byte("G3", map);
    row_next("G4", &machine);
    restart(&machine);
    punch(fd, 0, PAGE);
    row_next("G5", &machine);
    restart(&machine);
    touch_write(map, 0x22);
    delete_data(&machine);
    row_next("G6", &machine);
    row_next("G7", &machine);
    restart(&machine);
    struct region2 again = {
        .slot = 5, .flags = SLOT_GMEM, .gpa = DATA_GPA, .size = PAGE, .hva = (uintptr_t)map, .fd = (uint32_t)fd};
    row_ret("G8", set_region(machine.vm, &again));
    row_next("G9", &machine);
}

static void ask_closed_file(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 0x23);
    bind_data(&machine, fd, map);
    close(fd);
    row_next("G10", &machine);
    row_next("G11", &machine);
    restart(&machine);
    munmap(map, FILE_SIZE);
    row_next("G12", &machine);
    row_ret("G13", set_region(machine.vm, &(struct region2){.slot = DATA_SLOT}));
}

static void ask_without_mapping(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    touch_write(map_shared(fd, FILE_SIZE), 0x41);
    bind_data(&machine, fd, NULL);
    row_next("G14", &machine);
    row("G15", "nr_cache=%s", answer(cached_pages(fd)));
}

static void ask_unrelated(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE), *page = anonymous_page(0x33);
    touch_write(map, 0x41);
    bind_data(&machine, fd, page);
    row_next("G16", &machine);
    row_next("G17", &machine);
    row("G18", "0x%x, 0x%x", touch_read(map).value, touch_read(page).value);
}

static void ask_not_shared(void)
{
    struct machine machine = new_machine(), other = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_MMAP), second = new_gmem(other.vm, FILE_SIZE, GMEM_MMAP);
    bind_data(&machine, fd, map_shared(fd, FILE_SIZE));
    row_next("G19", &machine);
    bind_data(&other, second, NULL);
    row_next("G20", &other);
    row("G21", "nr_cache=%s", answer(cached_pages(second)));
}

static void ask_not_mappable(void)
{
    struct machine machine = new_machine(), other = new_machine(), third = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, 0);
    char *page = anonymous_page(0x31);
    bind_data(&machine, fd, page);
    row_next("G22", &machine);
    row_next("G23", &machine);
    row_byte("G24", page);
    row("G25", "nr_cache=%s", answer(cached_pages(fd)));
    restart(&machine);
    close(fd);
    row_next("G26", &machine);
    bind_data(&other, new_gmem(other.vm, FILE_SIZE, 0), NULL);
    row_next("G27", &other);
    bind_data(&third, new_gmem(third.vm, FILE_SIZE, GMEM_INIT_SHARED), anonymous_page(0x32));
    row_next("G28", &third);
}

static void ask_plain_over_gmem(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 0x61);
    bind_data(&machine, -1, map);
    row_next("G29", &machine);
    row_next("G30", &machine);
    row_byte("G31", map);
    restart(&machine);
    punch(fd, 0, PAGE);
    row_next("G32", &machine);
    struct region2 also = {
        .slot = 6, .flags = SLOT_GMEM, .gpa = 16 * MIB, .size = PAGE, .hva = (uintptr_t)map, .fd = (uint32_t)fd};
    row_ret("G33", set_region(machine.vm, &also));
}

static void ask_plain_elsewhere(void)
{
    struct machine machine = new_machine(), other = new_machine();
    int vm = new_vm(), fd = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 0x62);
    bind_data(&machine, -1, map);
    row_next("G34", &machine);
    restart(&machine);
    mprotect(map, FILE_SIZE, PROT_READ);
    row_next("G35", &machine);
    row_next("G36", &machine);
    bind_data(&other, -1, map_shared(new_gmem(vm, FILE_SIZE, GMEM_MMAP), FILE_SIZE));
    row_next("G37", &other);
}

static void ask_vm_closed(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 0x44);
    bind_data(&machine, fd, map);
    close(machine.vm);
    row_next("G38", &machine);
}

static void row_pre_fault(const char *id, int vcpu, struct pre_fault range)
{
    row_ret(id, ioctl(vcpu, PRE_FAULT, &range));
}

static void ask_pre_fault(void)
{
    struct machine machine = new_machine();
    int fd = new_gmem(machine.vm, FILE_SIZE, GMEM_BOTH);
    bind_data(&machine, fd, map_shared(fd, FILE_SIZE));
    row_pre_fault("G39", machine.vcpu, (struct pre_fault){.gpa = DATA_GPA, .size = PAGE});
    row_pre_fault("G40", machine.vcpu, (struct pre_fault){.gpa = DATA_GPA, .size = PAGE, .flags = 1});
    row_pre_fault("G41", machine.vcpu, (struct pre_fault){.gpa = DATA_GPA});
    row_pre_fault("G42", machine.vcpu, (struct pre_fault){.gpa = DATA_GPA, .size = 100});
    row_pre_fault("G43", machine.vcpu, (struct pre_fault){.gpa = 64 * MIB, .size = PAGE});
    uint64_t attributes[4] = {DATA_GPA, PAGE};
    row_ret("G44", ioctl(machine.vcpu, SET_ATTRIBUTES, attributes));
}

static void run_in_child(void *machine)
{
    const struct machine *inherited = machine;
    row_ret("G45", ioctl(inherited->vcpu, KVM_RUN, 0ul));
}

static void ask_fork(void)
{
    struct machine machine = new_machine();
    in_child(run_in_child, &machine);
}

static const struct group groups[] = {
    {"own mapping", ask_own_mapping},
    {"closed file", ask_closed_file},
    {"no mapping", ask_without_mapping},
    {"unrelated", ask_unrelated},
    {"not shared", ask_not_shared},
    {"not mappable", ask_not_mappable},
    {"plain", ask_plain_over_gmem},
    {"plain elsewhere", ask_plain_elsewhere},
    {"vm closed", ask_vm_closed},
    {"pre-fault", ask_pre_fault},
    {"fork", ask_fork},
};
SECTION(guest_section, "G", groups);
