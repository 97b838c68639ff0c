/*
 * A child with a VM, a mapped guest_memfd, private pages and a vCPU that runs, which is killed in the middle of it. Ends
 * with 0 if the parent can then do all of it itself. With an argument: such a process, which says "ready" and waits.
 */
#define _GNU_SOURCE
#include "client.h"

#include <sys/prctl.h>
#include <sys/wait.h>

static const uint8_t tell_and_spin[] = {0xc6, 0x03, 0x01, 0xeb, 0xfe}; /* mov byte [rbx], 1; jmp . */

static uint8_t *start_machine(struct machine *m) {
    const uint64_t flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;

    if (open_machine(m, KVM_X86_SW_PROTECTED_VM, tell_and_spin, sizeof(tell_and_spin))) bail_out("machine");
    int gmem = create_gmem(m->vm, 4 * PAGE, flags);
    if (gmem < 0 || set_region(m->vm, DATA_SLOT, DATA_GPA, 4 * PAGE, NULL, gmem)) bail_out("memory");
    struct kvm_memory_attributes2 private = {.offset = PAGE, .size = PAGE, .attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE};
    if (ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &private)) bail_out("conversion");
    return map_shared(gmem, 4 * PAGE);
}

static void run_until_killed(int ready) {
    struct machine m;
    uint8_t *memory = start_machine(&m);
    struct kvm_regs regs = {.rip = CODE, .rbx = DATA_GPA, .rflags = 2};

    if (!fork()) { /* a second process that has the files, and dies with the first */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (!*(volatile uint8_t *)memory) usleep(1000);
        if (write(ready, "ready\n", 6) != 6) _exit(1);
        pause();
    }
    ioctl(m.vcpu, KVM_SET_REGS, &regs);
    ioctl(m.vcpu, KVM_RUN, 0);
    _exit(1);
}

int main(int count, char **arguments) {
    int ready[2];
    char byte;

    (void)arguments;
    open_kvm();
    if (count > 1) {
        signal(SIGTERM, SIG_DFL);
        run_until_killed(STDOUT_FILENO);
    }
    if (pipe(ready)) bail_out("pipe");
    pid_t child = fork();
    if (!child) {
        setpgid(0, 0);
        run_until_killed(ready[1]);
    }
    if (read(ready[0], &byte, 1) != 1) bail_out("child");
    kill(-child, SIGKILL);
    waitpid(child, NULL, 0);
    struct machine m;
    uint8_t *memory = start_machine(&m);
    if (!access_is_refused(memory + PAGE, -1) || access_is_refused(memory, 1)) return 1;
    munmap(memory, 4 * PAGE);
    close_machine(&m);
    return 0;
}
