/* ioctls: arguments, results, descriptors. */
#include "client.h"

static void plain(void)
{
    int kvm = kvm_open();
    uint64_t in[18], out[18];
    for (int i = 0; i < 18; i++)
        in[i] = (uint64_t)i * 3;
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    CHECK(!ioctl(kvm, SET_REGS, in) && !ioctl(kvm, GET_REGS, out) && !memcmp(in, out, sizeof(in)));
    CHECK_ERRNO(ioctl(kvm, 0xAEAA, 0), ENOTTY);
}

static void efault(void)
{
    int kvm = kvm_open();
    char *readonly = mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK_ERRNO(ioctl(kvm, SET_REGS, NULL), EFAULT);
    CHECK_ERRNO(ioctl(kvm, SET_REGS, (void *)1), EFAULT);
    CHECK_ERRNO(ioctl(kvm, GET_REGS, NULL), EFAULT);
    CHECK_ERRNO(ioctl(kvm, GET_REGS, readonly), EFAULT);
    CHECK_ERRNO(ioctl(kvm, GET_REGS, readonly + PAGE - 8), EFAULT);
    CHECK_ERRNO(ioctl(kvm, READ_SUM, 8), EFAULT);
    CHECK_ERRNO(ioctl(kvm, WRITE_X, readonly), EFAULT);
    CHECK(ioctl(kvm, READ_SUM, readonly) == 0);
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
}

static void upcalls(void)
{
    int kvm = kvm_open();
    char text[16] = {1, 2, 3};
    CHECK(ioctl(kvm, READ_SUM, text) == 6);
    CHECK(!ioctl(kvm, WRITE_X, text) && text[0] == 'x' && text[15] == 'x');
    CHECK(ioctl(kvm, FD_FACTS, kvm) == 1);
    CHECK_ERRNO(ioctl(kvm, FD_FACTS, 999), EBADF);
    CHECK_ERRNO(ioctl(kvm, FD_FACTS, -1), EBADF);
}

static void full_table(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), probe = dup(kvm);
    close(probe);
    struct rlimit limit = {probe, probe};
    CHECK(vm >= 0 && !setrlimit(RLIMIT_NOFILE, &limit));
    int released = ioctl(kvm, RELEASED, 0);
    CHECK_ERRNO(ioctl(kvm, CREATE_VM, 0), EMFILE);
    CHECK_ERRNO(ioctl(kvm, CREATE_VM, 0), EMFILE);
    CHECK(!close(vm)); /* its SYNC counts the two that found no room as well */
    CHECK(ioctl(kvm, RELEASED, 0) == released + 3);
    CHECK(ioctl(kvm, CREATE_VM, 0) == vm);
}

static void lowest_number(void)
{
    int first = dup(0);
    close(first);
    int kvm = kvm_open();
    CHECK(kvm == first && ioctl(kvm, CREATE_VM, 0) == first + 1);
    CHECK(fcntl(first + 1, F_GETFD) == FD_CLOEXEC);
    CHECK(gmem_create(first + 1, PAGE) == first + 2);
    CHECK(fcntl(first + 2, F_GETFD) == 0);
    int plain = open("/dev/kvm", O_RDWR);
    CHECK(fcntl(plain, F_GETFD) == 0);
}

static void close_is_release(void)
{
    int kvm = kvm_open();
    for (int i = 0; i < 200; i++) {
        int released = ioctl(kvm, RELEASED, 0), vm = ioctl(kvm, CREATE_VM, 0), copy = dup(vm);
        CHECK(!close(vm) && ioctl(kvm, RELEASED, 0) == released);
        CHECK(!close(copy) && ioctl(kvm, RELEASED, 0) == released + 1);
        vm = ioctl(kvm, CREATE_VM, 0);
        CHECK(dup2(kvm, vm) == vm && ioctl(kvm, RELEASED, 0) == released + 2);
        close(vm);
    }
}

static void hidden(void)
{
    int kvm = kvm_open();
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    for (int fd = 3; fd < 70000; fd++)
        if (fd != kvm)
            close(fd);
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    CHECK(!close_range(kvm + 1, ~0U, 0));
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    closefrom(kvm + 1);
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    int hellos = ioctl(kvm, HELLOS, 0);
    CHECK(hellos == 1); /* still the first channel */
    CHECK(!close_range(3, ~0U, 0));
    CHECK_ERRNO(ioctl(kvm, GET_API_VERSION, 0), EBADF);
    kvm = kvm_open();
    CHECK(ioctl(kvm, HELLOS, 0) == 1);
}

static void *call_once(void *kvm)
{
    CHECK(ioctl(*(int *)kvm, GET_API_VERSION, 0) == 12);
    return NULL;
}

/* A thread's channel ends with it. */
static void threads(void)
{
    int kvm = kvm_open();
    pthread_t thread[8];
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 8; i++)
            CHECK(!pthread_create(&thread[i], NULL, call_once, &kvm));
        for (int i = 0; i < 8; i++)
            pthread_join(thread[i], NULL);
    }
    int probe = fcntl(kvm, F_DUPFD, 600);
    CHECK(probe >= 0 && ioctl(kvm, HELLOS, 0) == 401);
    char name[64];
    int open_now = 0;
    struct stat status;
    for (int fd = 0; fd < 70000; fd++)
        open_now += !fstat(fd, &status);
    snprintf(name, sizeof(name), "%d", open_now);
    CHECK(open_now < 10);
}

static void gone(void)
{
    CHECK_ERRNO(open("/dev/kvm", O_RDWR), ENODEV);
}

static void none_of_ours(void)
{
    int pair[2], size = 0, memory = memfd_create("own", 0);
    kvm_open();
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && write(pair[0], "hello", 5) == 5);
    CHECK(!ioctl(pair[1], FIONREAD, &size) && size == 5);
    CHECK_ERRNO(ioctl(pair[1], GET_API_VERSION, 0), ENOTTY);
    CHECK_ERRNO(ioctl(memory, GET_API_VERSION, 0), ENOTTY);
    CHECK(!ftruncate(memory, PAGE) && pwrite(memory, "x", 1, 0) == 1 && !fallocate(memory, 0, 0, 2 * PAGE));
    CHECK(*(char *)mmap(0, PAGE, PROT_READ, MAP_SHARED, memory, 0) == 'x');
    CHECK_ERRNO(ioctl(-1, GET_API_VERSION, 0), EBADF);
    CHECK_ERRNO(open("/nonexistent", O_RDONLY), ENOENT);
    const char *volatile nowhere = NULL;
    CHECK_ERRNO(open(nowhere, O_RDONLY), EFAULT);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"plain", plain},
        {"efault", efault},
        {"upcalls", upcalls},
        {"full_table", full_table},
        {"lowest_number", lowest_number},
        {"close_is_release", close_is_release},
        {"hidden", hidden},
        {"threads", threads},
        {"gone", gone},
        {"none_of_ours", none_of_ours},
        {NULL, NULL},
    };
    return run_test(tests, argc, argv);
}
