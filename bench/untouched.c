/* Calls that have nothing to do with KVM, timed: "name<TAB>nanoseconds" a line. With an argument the process has a VM and
 * a mapping of a guest_memfd first, so that the shim is not idle. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, ROUNDS = 20000 };
#define CREATE_VM 0xAE01
#define CREATE_GUEST_MEMFD 0xC040AED4UL

static int null, zero;
static char *memory;

static void do_ioctl(void) { ioctl(null, FIONREAD, memory); }
static void do_read(void) { (void)!read(zero, memory, 1); }
static void do_pread(void) { (void)!pread(zero, memory, 1, 0); }
static void do_fstat(void) { fstat(null, (struct stat *)memory); }
static void do_open(void) { close(open("/dev/null", O_RDONLY)); }
static void do_dup(void) { close(dup(null)); }
static void do_map(void) { munmap(mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE); }
static void do_protect(void) { mprotect(memory, PAGE, PROT_READ | PROT_WRITE); }
static void do_advise(void) { madvise(memory, PAGE, MADV_NORMAL); }

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static void report(const char *name, void (*call)(void))
{
    double began = nanoseconds();
    for (int i = 0; i < ROUNDS; i++)
        call();
    printf("%s\t%.1f\n", name, (nanoseconds() - began) / ROUNDS);
}

static void start_vm(void)
{
    uint64_t argument[8] = {PAGE, 1};
    int vm = ioctl(open("/dev/kvm", O_RDWR), CREATE_VM, 0), gmem = ioctl(vm, CREATE_GUEST_MEMFD, argument);
    if (mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0) == MAP_FAILED)
        exit(1);
}

int main(int argc, char **argv)
{
    (void)argv;
    if (argc > 1)
        start_vm();
    null = open("/dev/null", O_RDWR);
    zero = open("/dev/zero", O_RDONLY);
    memory = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    report("ioctl of another device", do_ioctl);
    report("read 1 byte", do_read);
    report("pread 1 byte", do_pread);
    report("fstat", do_fstat);
    report("open + close", do_open);
    report("dup + close", do_dup);
    report("mmap + munmap", do_map);
    report("mprotect", do_protect);
    report("madvise", do_advise);
    return 0;
}
