/* The machine of section G. Real mode: no page tables to set up, and the rows are about guest physical addresses. */
#include "machine.h"

#define CODE_GPA 0x1000ul
#define CODE_SLOT 0u

/* ax is loaded with the segment of DATA_GPA; then the steps that the table lists. */
static const unsigned char program[] = {
    0xb8, 0x00, 0x10,          /* mov ax, 0x1000 */
    0x8e, 0xd8,                /* mov ds, ax */
    0xa0, 0x00, 0x00,          /* mov al, [0] */
    0xe6, 0x10,                /* out 0x10, al */
    0xc6, 0x06, 0,    0, 0x77, /* mov byte [0], 0x77 */
    0xa0, 0x00, 0x00,          /* mov al, [0] */
    0xe6, 0x11,                /* out 0x11, al */
    0xf4,                      /* hlt */
};

static void set_registers(const struct machine *machine)
{
    struct kvm_sregs special;
    struct kvm_regs general = {.rip = CODE_GPA, .rflags = 2};
    if (ioctl(machine->vcpu, KVM_GET_SREGS, &special) < 0)
        stop("KVM_GET_SREGS");
    special.cs.base = 0;
    special.cs.selector = 0;
    if (ioctl(machine->vcpu, KVM_SET_SREGS, &special) < 0 || ioctl(machine->vcpu, KVM_SET_REGS, &general) < 0)
        stop("KVM_SET_REGS");
}

struct machine new_machine(void)
{
    int kvm = open_kvm();
    struct machine machine = {.vm = new_vm()};
    machine.vcpu = ioctl(machine.vm, KVM_CREATE_VCPU, 0ul);
    size_t run_size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0ul);
    machine.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
    if (machine.run == MAP_FAILED)
        stop("mmap of the vCPU");
    char *code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(code, program, sizeof(program));
    struct region2 slot = {.slot = CODE_SLOT, .gpa = CODE_GPA, .size = PAGE, .hva = (uintptr_t)code};
    if (set_region(machine.vm, &slot) < 0)
        stop("the slot of the code");
    set_registers(&machine);
    close(kvm);
    return machine;
}

/* immediate_exit completes a pending exit and comes back with EINTR before the guest runs. */
void restart(const struct machine *machine)
{
    machine->run->immediate_exit = 1;
    ioctl(machine->vcpu, KVM_RUN, 0ul);
    machine->run->immediate_exit = 0;
    set_registers(machine);
}

static const char *io_text(const struct kvm_run *run)
{
    static char text[64];
    const unsigned char *data = (const unsigned char *)run + run->io.data_offset;
    snprintf(text, sizeof(text), "KVM_EXIT_IO port=0x%x data=0x%x", run->io.port, *data);
    return text;
}

/* A read is completed with 0, which row G7 is about. */
static const char *mmio_text(struct kvm_run *run)
{
    static char text[96];
    snprintf(text, sizeof(text), "KVM_EXIT_MMIO gpa=0x%llx len=%u is_write=%u", run->mmio.phys_addr, run->mmio.len,
             run->mmio.is_write);
    if (!run->mmio.is_write)
        memset(run->mmio.data, 0, sizeof(run->mmio.data));
    return text;
}

const char *next_exit(const struct machine *machine)
{
    static char text[64];
    if (ioctl(machine->vcpu, KVM_RUN, 0ul) < 0) {
        snprintf(text, sizeof(text), "%s exit_reason=%u", errno_name(errno), machine->run->exit_reason);
        return text;
    }
    if (machine->run->exit_reason == KVM_EXIT_IO)
        return io_text(machine->run);
    if (machine->run->exit_reason == KVM_EXIT_MMIO)
        return mmio_text(machine->run);
    snprintf(text, sizeof(text), "exit_reason=%u", machine->run->exit_reason);
    return text;
}

void bind_data(const struct machine *machine, int fd, const void *hva)
{
    struct region2 slot = {.slot = DATA_SLOT, .gpa = DATA_GPA, .size = PAGE, .hva = (uintptr_t)hva};
    if (fd >= 0) {
        slot.flags = SLOT_GMEM;
        slot.fd = (uint32_t)fd;
    }
    if (set_region(machine->vm, &slot) < 0)
        stop("the slot of the data");
}

void delete_data(const struct machine *machine)
{
    set_region(machine->vm, &(struct region2){.slot = DATA_SLOT});
}
