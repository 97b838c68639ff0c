/*
 * KVM_LINK_GUEST_MEMFD and what goes with it: the errno of each bad argument, views that are told apart by their
 * descriptors alone, a migration, helpers, and that nothing of a thousand of them is left in the server.
 */
#define _GNU_SOURCE
#include "client.h"

#include <dirent.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#ifndef KVM_LINK_GUEST_MEMFD
struct kvm_link_guest_memfd {
    __u64 fd, flags, reserved[6];
};
#define KVM_LINK_GUEST_MEMFD _IOWR(KVMIO, 0xd6, struct kvm_link_guest_memfd)
#endif
#ifndef KVM_CAP_VM_COPY_ENC_CONTEXT_FROM
#define KVM_CAP_VM_COPY_ENC_CONTEXT_FROM 197
#endif
#ifndef KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM 206
#endif

enum { PAGES = 4, SIZE = PAGES * PAGE };
static const uint64_t born_shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
/* mov al, [rbx]; inc byte [rbx]; out 0x10, al */
static const uint8_t tell_and_count[] = {0x8a, 0x03, 0xfe, 0x03, 0xe6, 0x10};

static int new_vm(unsigned long type) {
    return ioctl(kvm, KVM_CREATE_VM, type);
}

static int link_gmem(int vm, uint64_t fd, uint64_t flags) {
    struct kvm_link_guest_memfd arguments = {.fd = fd, .flags = flags};
    return ioctl(vm, KVM_LINK_GUEST_MEMFD, &arguments);
}

static int take_context(int vm, unsigned cap, int source) {
    struct kvm_enable_cap arguments = {.cap = cap, .args = {(uint32_t)source}};
    return ioctl(vm, KVM_ENABLE_CAP, &arguments);
}

static int convert(int gmem, uint64_t page, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = page * PAGE, .size = PAGE, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

static void bad_links(void) {
    int vm = new_vm(KVM_X86_SW_PROTECTED_VM), other = new_vm(KVM_X86_SW_PROTECTED_VM), plain = new_vm(0);
    int gmem = create_gmem(vm, SIZE, born_shared);

    CHECK(capability(vm, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) == 1, "no migration");
    CHECK_ERRNO(ioctl(other, KVM_LINK_GUEST_MEMFD, NULL), EFAULT);
    CHECK_ERRNO(link_gmem(vm, gmem, 1), EINVAL);
    CHECK_ERRNO(link_gmem(other, 999, 0), EINVAL);
    CHECK_ERRNO(link_gmem(other, vm, 0), EINVAL);
    CHECK_ERRNO(link_gmem(other, STDOUT_FILENO, 0), EINVAL);
    CHECK_ERRNO(link_gmem(vm, gmem, 0), EINVAL);
    CHECK_ERRNO(link_gmem(plain, gmem, 0), EINVAL);
    CHECK_ERRNO(link_gmem(gmem, gmem, 0), ENOTTY);
    int own = create_gmem(other, PAGE, 0);
    CHECK_ERRNO(link_gmem(other, gmem, 0), EINVAL);
    close(own);
    int linked = link_gmem(other, gmem, 0);
    CHECK(linked >= 0, "errno %d", errno);
    CHECK_ERRNO(set_region(vm, 0, 0, SIZE, NULL, linked), EINVAL);
    CHECK_ERRNO(set_region(other, 0, 0, SIZE, NULL, gmem), EINVAL);
    CHECK(!set_region(other, 0, 0, SIZE, NULL, linked), "errno %d", errno);
    close(linked), close(gmem), close(plain), close(other), close(vm);
}

static void bad_moves(void) {
    int vm = new_vm(KVM_X86_SW_PROTECTED_VM), other = new_vm(KVM_X86_SW_PROTECTED_VM), plain = new_vm(0);
    int gmem = create_gmem(vm, SIZE, born_shared), helper = new_vm(KVM_X86_SW_PROTECTED_VM);
    const unsigned move = KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, copy = KVM_CAP_VM_COPY_ENC_CONTEXT_FROM;

    CHECK_ERRNO(take_context(other, move, 999), EBADF);
    CHECK_ERRNO(take_context(other, move, gmem), EBADF);
    CHECK_ERRNO(take_context(other, move, other), EINVAL);
    CHECK_ERRNO(take_context(plain, move, vm), EINVAL);
    CHECK_ERRNO(take_context(other, copy, plain), EINVAL);
    CHECK(!take_context(helper, copy, vm), "errno %d", errno);
    CHECK_ERRNO(take_context(other, move, vm), EBUSY);
    CHECK_ERRNO(take_context(other, copy, helper), EINVAL);
    close(helper);
    int used = create_gmem(other, PAGE, 0);
    CHECK_ERRNO(take_context(other, move, vm), EINVAL);
    close(used);
    CHECK(!take_context(other, move, vm), "errno %d", errno);
    CHECK_ERRNO(create_gmem(vm, PAGE, 0), EIO);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 0), EIO);
    CHECK_ERRNO(take_context(plain, move, vm), EINVAL);
    close(gmem), close(plain), close(other), close(vm);
}

/* Each of two files of one inode is closed while the other stays, whichever it is, and only that one's slots go. */
static void closed_apart(void) {
    for (int first_goes = 0; first_goes < 2; first_goes++) {
        int vm = new_vm(KVM_X86_SW_PROTECTED_VM), helper = new_vm(KVM_X86_SW_PROTECTED_VM);
        int gmem = create_gmem(vm, SIZE, born_shared);
        struct stat status, other;

        CHECK(!take_context(helper, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, vm), "errno %d", errno);
        int linked = link_gmem(helper, gmem, 0);
        CHECK(linked >= 0, "errno %d", errno);
        CHECK(!fstat(gmem, &status) && !fstat(linked, &other), "fstat");
        CHECK(status.st_ino == other.st_ino && status.st_dev == other.st_dev, "not one inode");
        CHECK_ERRNO(lseek(linked, 0, SEEK_CUR), ESPIPE);
        uint8_t *memory = map_shared(linked, SIZE);
        memory[0] = 7;
        int stays = first_goes ? linked : gmem, goes = dup(first_goes ? gmem : linked);
        close(first_goes ? gmem : linked);
        CHECK(!set_region(first_goes ? vm : helper, 0, 0, PAGE, NULL, goes), "a duplicate is the file");
        close(goes);
        if (!first_goes) munmap(memory, SIZE); /* it held its file */
        CHECK_ERRNO(set_region(first_goes ? vm : helper, 1, SIZE, PAGE, NULL, goes), EBADF);
        CHECK(!set_region(first_goes ? helper : vm, 0, 0, PAGE, NULL, stays), "errno %d", errno);
        memory = map_shared(stays, SIZE);
        CHECK(memory[0] == 7, "%d", memory[0]);
        munmap(memory, SIZE);
        int again = link_gmem(first_goes ? vm : helper, stays, 0);
        CHECK(again >= 0, "errno %d", errno);
        CHECK(!convert(again, 1, true) && !convert(stays, 1, false), "errno %d", errno);
        close(again), close(stays), close(helper), close(vm);
    }
}

/* A conversion through one file closes the page in the mappings of all, in other processes as well. */
static void one_state(void) {
    int vm = new_vm(KVM_X86_SW_PROTECTED_VM), helper = new_vm(KVM_X86_SW_PROTECTED_VM), plain = new_vm(0), status;
    int gmem = create_gmem(vm, SIZE, born_shared);

    CHECK(!take_context(helper, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, vm), "errno %d", errno);
    CHECK(!take_context(plain, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, vm), "errno %d", errno);
    int linked = link_gmem(helper, gmem, 0), shared_only = link_gmem(plain, gmem, 0);
    CHECK(linked >= 0 && shared_only >= 0, "errno %d", errno);
    uint8_t *first = map_shared(gmem, SIZE), *second = map_shared(linked, SIZE);
    memset(first, 5, SIZE);
    CHECK(second[PAGE] == 5, "%d", second[PAGE]);
    CHECK_ERRNO(convert(shared_only, 1, true), EINVAL);
    pid_t child = fork();
    if (!child) _exit(convert(linked, 1, true) || !access_is_refused(second + PAGE, -1));
    waitpid(child, &status, 0);
    CHECK(!status, "status %d", status);
    CHECK_SIGBUS(first + PAGE, -1);
    CHECK_SIGBUS(second + PAGE, 1);
    CHECK(second[2 * PAGE] == 5, "a neighbour");
    CHECK(!convert(gmem, 1, false), "errno %d", errno);
    CHECK(second[PAGE] == 5 && first[PAGE] == 5, "bytes are kept");
    munmap(first, SIZE), munmap(second, SIZE);
    close(shared_only), close(linked), close(gmem), close(plain), close(helper), close(vm);
}

static bool guest_counts(struct machine *m, uint8_t expected) {
    uint8_t byte = 0;
    return run_guest(m, DATA_GPA, 0, &byte) && byte == expected;
}

static void migration(void) {
    struct machine source, destination;
    uint8_t byte;

    CHECK(!open_machine(&source, KVM_X86_SW_PROTECTED_VM, tell_and_count, sizeof(tell_and_count)), "machine");
    int gmem = create_gmem(source.vm, SIZE, 0);
    CHECK(!set_region(source.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem), "errno %d", errno);
    CHECK(guest_counts(&source, 0) && guest_counts(&source, 1), "source");
    CHECK(!open_machine(&destination, KVM_X86_SW_PROTECTED_VM, tell_and_count, sizeof(tell_and_count)), "machine");
    int linked = link_gmem(destination.vm, gmem, 0);
    CHECK(linked >= 0, "errno %d", errno);
    CHECK(!set_region(destination.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, linked), "errno %d", errno);
    CHECK(guest_counts(&source, 2), "the source runs until the identity goes");
    CHECK(!take_context(destination.vm, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, source.vm), "errno %d", errno);
    CHECK(!run_guest(&source, DATA_GPA, 0, &byte) && errno == EIO, "errno %d", errno);
    close(gmem);
    close_machine(&source);
    CHECK(guest_counts(&destination, 3) && guest_counts(&destination, 4), "destination");
    close(linked);
    close_machine(&destination);
}

static int open_in_server(void) {
    char path[64];
    int count = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", getppid());
    DIR *directory = opendir(path);
    while (directory && readdir(directory)) count++;
    if (directory) closedir(directory);
    return count;
}

static void a_thousand(void) {
    int vm = new_vm(KVM_X86_SW_PROTECTED_VM), gmem = create_gmem(vm, SIZE, born_shared);
    uint8_t *memory = map_shared(gmem, SIZE);
    memory[0] = 9;
    munmap(memory, SIZE);
    int before = open_in_server(), lowest = dup(0);
    close(lowest);

    for (int turn = 0; turn < 1000; turn++) {
        int next = new_vm(KVM_X86_SW_PROTECTED_VM), linked = link_gmem(next, gmem, 0);
        CHECK(linked >= 0 && !set_region(next, 0, 0, SIZE, NULL, linked), "turn %d, errno %d", turn, errno);
        CHECK(!take_context(next, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, vm), "turn %d, errno %d", turn, errno);
        close(gmem), close(vm);
        vm = next, gmem = linked;
    }
    memory = map_shared(gmem, SIZE);
    CHECK(memory[0] == 9, "%d", memory[0]);
    munmap(memory, SIZE);
    CHECK(open_in_server() == before, "%d descriptors in the server, not %d", open_in_server(), before);
    close(gmem), close(vm);
    int after = dup(0);
    CHECK(after <= lowest, "descriptor %d is the next, not %d", after, lowest);
    close(after);
}

int main(void) {
    static const struct test_case cases[] = {
        {"bad links", bad_links},     {"bad moves", bad_moves}, {"closed apart", closed_apart},
        {"one state for all", one_state}, {"migration", migration}, {"a thousand migrations", a_thousand},
    };

    open_kvm();
    if (capability(kvm, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) != 1) skip_all("no migration inside a host");
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
