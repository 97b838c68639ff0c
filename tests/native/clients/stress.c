/* Threads that call, map, fork and close while signals, whose handler calls as well, come all the time. */
#include "client.h"

enum { THREADS = 4, SECONDS = 3 };

static int kvm, vm, gmem;
static volatile int stop;
static unsigned long done;

static void handler(int signal)
{
    int saved = errno;
    (void)signal;
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    char *map = mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0);
    CHECK(map != MAP_FAILED && !munmap(map, PAGE));
    errno = saved;
}

static void use_files(void)
{
    uint64_t regs[18];
    int copy = dup(gmem), fresh = ioctl(kvm, CREATE_VM, 0);
    CHECK(copy >= 0 && fresh >= 0 && !ioctl(fresh, GET_REGS, regs));
    CHECK_ERRNO(read(copy, regs, 8), EINVAL);
    CHECK(!close(copy) && !close(fresh));
    CHECK_ERRNO(ioctl(fresh + 1000, GET_REGS, regs), EBADF);
}

static void use_memory(void)
{
    char *map = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    CHECK(map != MAP_FAILED && !mprotect(map, PAGE, PROT_READ) && !madvise(map, PAGE, MADV_DONTNEED));
    CHECK(!mprotect(map, PAGE, PROT_READ | PROT_WRITE));
    map[2 * PAGE] = 1;
    char *moved = mremap(map, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED && moved[2 * PAGE] == 1 && !munmap(moved, 8 * PAGE));
}

static void use_child(void)
{
    int status;
    pid_t child = fork();
    if (!child)
        _exit(ioctl(kvm, GET_API_VERSION, 0) == 12 ? 0 : 1);
    CHECK(child > 0);
    while (waitpid(child, &status, 0) != child)
        CHECK(errno == EINTR);
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
}

static void *work(void *argument)
{
    static void (*const all[])(void) = {use_files, use_memory, use_child};
    unsigned seed = (unsigned)(uintptr_t)argument;
    while (!stop) {
        all[rand_r(&seed) % 3]();
        __atomic_add_fetch(&done, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[THREADS];
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    kvm = kvm_open();
    vm = ioctl(kvm, CREATE_VM, 0);
    gmem = gmem_create(vm, 16 * PAGE);
    CHECK(!sigaction(SIGUSR1, &action, NULL));
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, work, (void *)(i + 1)));
    for (int i = 0; i < SECONDS * 500; i++) {
        usleep(2000);
        pthread_kill(threads[i % THREADS], SIGUSR1);
    }
    stop = 1;
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK(done > THREADS);
    return 0;
}
