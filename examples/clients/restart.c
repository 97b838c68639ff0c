/* A guest outlives its VMM: it counts in private memory, its VMM is killed, another one goes on with the count.
 *
 * A keeper, which runs no guest, holds what must stay: the descriptors of the VM and of its guest_memfd. The second VMM
 * links the memory, binds it, moves the identity of the VM and runs. gcc restart.c && guestmem run -- ./a.out */
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* What <linux/kvm.h> of most machines lacks. */
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, uint64_t[8])     /* size, flags, reserved */
#define LINK_GUEST_MEMFD _IOWR(KVMIO, 0xd6, uint64_t[8])       /* fd, flags, reserved */
#define SET_MEMORY_REGION2 _IOW(KVMIO, 0x49, uint64_t[20])      /* slot and flags, gpa, size, hva, offset, fd, padding */
#define SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, uint64_t[16]) /* offset, size, attributes, flags, error_offset, ... */
enum { PAGE = 4096, MMAP_AND_INIT_SHARED = 3, PRIVATE = 8, GUEST_MEMFD = 4, SW_PROTECTED_VM = 1 };
enum { MOVE_ENC_CONTEXT_FROM = 206, CODE = 0x1000, PORT = 0x10, SIZE = 16 * PAGE };

static const uint8_t count_for_ever[] = {
    0x66, 0xff, 0x06, 0x00, 0x20, /* inc dword [0x2000] */
    0x66, 0xa1, 0x00, 0x20,       /* mov eax, [0x2000] */
    0x66, 0xe7, PORT,             /* out PORT, eax */
    0xeb, 0xf2,                   /* jmp back */
};

static long must(long result, const char *what) {
    if (result >= 0) return result;
    perror(what);
    exit(1);
}

/* Two descriptors through a socket (SCM_RIGHTS). */
static void pass(int socket, int fds[2], int give) {
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(2 * sizeof(int))];
    } control = {.header = {CMSG_LEN(2 * sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    char byte = 0;
    struct iovec one = {&byte, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    if (give) memcpy(CMSG_DATA(&control.header), fds, 2 * sizeof(int));
    must(give ? sendmsg(socket, &message, 0) : recvmsg(socket, &message, 0), "pass");
    if (!give) memcpy(fds, CMSG_DATA(&control.header), 2 * sizeof(int));
}

static void bind_memory(int vm, int gmem) {
    uint64_t region[20] = {(uint64_t)GUEST_MEMFD << 32, 0, SIZE, 0, 0, gmem};
    must(ioctl(vm, SET_MEMORY_REGION2, region), "bind");
}

static int create_vcpu(int kvm, int vm, struct kvm_run **run) {
    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "vcpu");
    *run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "sregs");
    sregs.cs.base = sregs.cs.selector = 0;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "sregs");
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "regs");
    return vcpu;
}

/* Run the guest and tell `out` what it has counted to, `times` times. */
static void run(int vcpu, struct kvm_run *run, int out, int times) {
    while (times--) {
        must(ioctl(vcpu, KVM_RUN, 0), "run");
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT) exit(2);
        must(write(out, (char *)run + run->io.data_offset, 4), "tell");
    }
}

static void first_vmm(int keeper, int out) {
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM), "vm");
    uint64_t create[8] = {SIZE, MMAP_AND_INIT_SHARED};
    int gmem = must(ioctl(vm, CREATE_GUEST_MEMFD, create), "guest_memfd");
    char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    memcpy(memory + CODE, count_for_ever, sizeof(count_for_ever));
    uint64_t convert[16] = {0, SIZE, PRIVATE};
    must(ioctl(gmem, SET_MEMORY_ATTRIBUTES2, convert), "convert"); /* from here on it is the guest's alone */
    bind_memory(vm, gmem);
    pass(keeper, (int[]){vm, gmem}, 1);
    struct kvm_run *area;
    int vcpu = create_vcpu(kvm, vm, &area);
    run(vcpu, area, out, 1 << 30);
}

static void second_vmm(int source, int memory, int out) {
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), vm = must(ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM), "vm");
    uint64_t link[8] = {memory};
    int gmem = must(ioctl(vm, LINK_GUEST_MEMFD, link), "link");
    bind_memory(vm, gmem);
    struct kvm_run *area;
    int vcpu = create_vcpu(kvm, vm, &area);
    struct kvm_enable_cap move = {.cap = MOVE_ENC_CONTEXT_FROM, .args = {source}};
    must(ioctl(vm, KVM_ENABLE_CAP, &move), "move");
    close(source);
    close(memory);
    run(vcpu, area, out, 1000);
}

int main(void) {
    int sockets[2], counts[2], kept[2];
    uint32_t count = 0, before;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair");
    must(pipe(counts), "pipe");
    pid_t vmm = must(fork(), "fork");
    if (!vmm) first_vmm(sockets[1], counts[1]);
    pass(sockets[0], kept, 0);
    while (count < 1000) must(read(counts[0], &count, 4), "read");
    kill(vmm, SIGKILL);
    waitpid(vmm, NULL, 0);
    close(counts[1]);
    while (read(counts[0], &before, 4) == 4) count = before;
    printf("the first VMM was killed, its guest had counted beyond 1000: %s\n", count >= 1000 ? "yes" : "no");

    must(pipe(counts), "pipe");
    vmm = must(fork(), "fork");
    if (!vmm) {
        second_vmm(kept[0], kept[1], counts[1]);
        _exit(0);
    }
    close(kept[0]);
    close(kept[1]);
    close(counts[1]);
    must(read(counts[0], &before, 4), "read");
    /* The guest may have counted one that its VMM was killed before telling. */
    printf("in the second VMM it goes on from there: %s\n", before - count - 1 <= 1 ? "yes" : "no");
    while (read(counts[0], &count, 4) == 4) {}
    printf("and on: %s\n", count == before + 999 ? "yes" : "no");
    int status;
    waitpid(vmm, &status, 0);
    return status || before - count == 0;
}
