/*
 * A live update. "save PATH": a guest counts in private memory; its VM and memory are preserved in a session, which is
 * said to PATH by creating it, and this process waits to be ended. "restore": another process, after another server has
 * taken over, retrieves both and the guest counts on. "check" does what needs no update.
 */
#define _GNU_SOURCE
#include "client.h"

#include <sys/stat.h>

#ifndef LIVEUPDATE_IOCTL_TYPE
#define LIVEUPDATE_IOCTL_TYPE 0xBA
struct liveupdate_session {
    __u32 size;
    __s32 fd;
    __u8 name[64];
};
struct liveupdate_fd {
    __u32 size;
    __s32 fd;
    __u64 token;
};
struct liveupdate_finish {
    __u32 size, reserved;
};
#define CREATE_SESSION _IO(LIVEUPDATE_IOCTL_TYPE, 0x00)
#define RETRIEVE_SESSION _IO(LIVEUPDATE_IOCTL_TYPE, 0x01)
#define PRESERVE_FD _IO(LIVEUPDATE_IOCTL_TYPE, 0x40)
#define RETRIEVE_FD _IO(LIVEUPDATE_IOCTL_TYPE, 0x41)
#define FINISH _IO(LIVEUPDATE_IOCTL_TYPE, 0x42)
#endif

enum { PAGES = 4, SIZE = PAGES * PAGE, VM_TOKEN = 7, GMEM_TOKEN = 9 };
static const uint64_t born_shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
static const uint8_t tell_and_count[] = {0x8a, 0x03, 0xfe, 0x03, 0xe6, 0x10}; /* mov al, [rbx]; inc byte [rbx]; out */

static int session_by(int device, unsigned long request, const char *name) {
    struct liveupdate_session arguments = {.size = sizeof(arguments)};
    strcpy((char *)arguments.name, name);
    return ioctl(device, request, &arguments) ? -1 : arguments.fd;
}

static int preserve_fd(int session, int fd, uint64_t token) {
    struct liveupdate_fd arguments = {.size = sizeof(arguments), .fd = fd, .token = token};
    return ioctl(session, PRESERVE_FD, &arguments);
}

static int retrieve_fd(int session, uint64_t token) {
    struct liveupdate_fd arguments = {.size = sizeof(arguments), .token = token};
    return ioctl(session, RETRIEVE_FD, &arguments) ? -1 : arguments.fd;
}

static int convert(int gmem, uint64_t page, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = page * PAGE, .size = PAGE, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

static int device_open(void) {
    int device = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);
    if (device < 0) bail_out("/dev/liveupdate");
    return device;
}

static bool counts(struct machine *m, uint8_t expected) {
    uint8_t byte = 0;
    return run_guest(m, DATA_GPA, 0, &byte) && byte == expected;
}

static void save(const char *ready) {
    struct machine m;
    if (open_machine(&m, KVM_X86_SW_PROTECTED_VM, tell_and_count, sizeof(tell_and_count))) bail_out("machine");
    int gmem = create_gmem(m.vm, SIZE, born_shared), session = session_by(device_open(), CREATE_SESSION, "guest");
    uint8_t *memory = map_shared(gmem, SIZE);
    memory[PAGE] = 'p';
    if (convert(gmem, 0, true) || set_region(m.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem)) bail_out("memory");
    for (uint8_t count = 0; count < 3; count++)
        if (!counts(&m, count)) bail_out("guest");
    if (preserve_fd(session, m.vm, VM_TOKEN) || preserve_fd(session, gmem, GMEM_TOKEN)) bail_out("preserve");
    close(open(ready, O_CREAT | O_WRONLY, 0600));
    pause();
}

static void restore(void) {
    struct machine m = {.vm = -1};
    int device = device_open(), session = session_by(device, RETRIEVE_SESSION, "guest");
    CHECK(session >= 0, "errno %d", errno);
    CHECK_ERRNO(session_by(device, RETRIEVE_SESSION, "guest"), EINVAL);
    CHECK_ERRNO(session_by(device, RETRIEVE_SESSION, "other"), ENOENT);
    CHECK_ERRNO(retrieve_fd(session, 1), ENOENT);
    CHECK_ERRNO(retrieve_fd(session, GMEM_TOKEN), EINVAL);
    int vm = retrieve_fd(session, VM_TOKEN), gmem = retrieve_fd(session, GMEM_TOKEN);
    CHECK(vm >= 0 && gmem >= 0, "errno %d", errno);
    CHECK_ERRNO(retrieve_fd(session, VM_TOKEN), EBUSY);
    CHECK_ERRNO(preserve_fd(session, vm, 5), EINVAL);
    struct liveupdate_finish finish = {.size = sizeof(finish)};
    CHECK(!ioctl(session, FINISH, &finish), "errno %d", errno);
    close(session);
    uint8_t *memory = map_shared(gmem, SIZE);
    CHECK_SIGBUS(memory, -1);
    CHECK(memory[PAGE] == 'p' && !memory[2 * PAGE], "shared bytes");

    /* What open_machine() does after KVM_CREATE_VM, on the VM that there is. */
    CHECK(!open_machine(&m, KVM_X86_SW_PROTECTED_VM, tell_and_count, sizeof(tell_and_count)), "a VM for its low memory");
    uint8_t *low = m.low;
    m = (struct machine){.vm = vm, .low = low, .run_size = m.run_size};
    CHECK(!set_region(vm, LOW_SLOT, 0, LOW_SIZE, low, -1), "errno %d", errno);
    m.vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    m.run = map_shared(m.vcpu, m.run_size);
    CHECK(!enter_long_mode(m.vcpu), "errno %d", errno);
    CHECK(!set_region(vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem), "errno %d", errno);
    CHECK(counts(&m, 3) && counts(&m, 4), "the guest does not count on");
    CHECK(!convert(gmem, 0, false) && memory[0] == 5, "%d", memory[0]);
}

static void frozen(void) {
    int device = device_open(), vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    int gmem = create_gmem(vm, SIZE, born_shared), session = session_by(device, CREATE_SESSION, "one");
    uint8_t *memory = map_shared(gmem, SIZE);
    memory[0] = 1;

    CHECK(open("/dev/liveupdate", O_RDWR) < 0 && errno == EBUSY, "errno %d", errno);
    CHECK(session >= 0, "errno %d", errno);
    CHECK_ERRNO(session_by(device, CREATE_SESSION, "one"), EEXIST);
    CHECK_ERRNO(session_by(device, CREATE_SESSION, ""), EINVAL);
    CHECK_ERRNO(preserve_fd(session, 999, 1), EBADF);
    CHECK_ERRNO(preserve_fd(session, STDOUT_FILENO, 1), ENOENT);
    CHECK_ERRNO(preserve_fd(session, gmem, 1), EINVAL);
    CHECK(!preserve_fd(session, vm, 1), "errno %d", errno);
    CHECK_ERRNO(preserve_fd(session, gmem, 1), EEXIST);
    CHECK_ERRNO(preserve_fd(session, vm, 2), EBUSY);
    CHECK(!preserve_fd(session, gmem, 2), "errno %d", errno);
    CHECK_ERRNO(retrieve_fd(session, 1), EINVAL);
    CHECK_ERRNO(ioctl(session, 0xBAFF, 0), ENOTTY);

    CHECK_ERRNO(allocate(gmem, 0, PAGE), EPERM);
    CHECK_ERRNO(punch(gmem, 0, PAGE), EPERM);
    CHECK_ERRNO(convert(gmem, 0, true), EPERM);
    CHECK_SIGBUS(memory + PAGE, 1);
    uint8_t *second = map_shared(gmem, SIZE);
    CHECK_SIGBUS(second + 2 * PAGE, 1);
    CHECK(memory[0] == 1 && second[0] == 1, "what is there can be had");
    close(session);
    memory[PAGE] = second[2 * PAGE] = 3;
    CHECK(!convert(gmem, 0, true) && !punch(gmem, 0, PAGE), "errno %d", errno);
    close(device), munmap(memory, SIZE), munmap(second, SIZE), close(gmem), close(vm);
    device = device_open();
    close(device);
}

int main(int count, char **arguments) {
    open_kvm();
    if (count > 2) save(arguments[2]);
    begin_case();
    if (count > 1 && !strcmp(arguments[1], "restore")) restore();
    else frozen();
    end_case("", count > 1 ? arguments[1] : "frozen");
    return finish();
}
