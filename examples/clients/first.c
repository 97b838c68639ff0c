/* A VMM's first steps with in-place conversion, in plain KVM calls: gcc first.c && guestmem run --explain -- ./a.out */
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* What <linux/kvm.h> of most machines lacks. */
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, uint64_t[8])     /* size, flags, reserved */
#define SET_MEMORY_REGION2 _IOW(KVMIO, 0x49, uint64_t[20])      /* slot and flags, gpa, size, hva, offset, fd, padding */
#define SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, uint64_t[16]) /* offset, size, attributes, flags, error_offset, ... */
enum { PAGE = 4096, MMAP_AND_INIT_SHARED = 3, PRIVATE = 8, GUEST_MEMFD = 4, SW_PROTECTED_VM = 1 };

static void on_bus_error(int number) {
    static const char text[] = "SIGBUS: the page is the guest's now\n";
    (void)number;
    _exit(write(1, text, sizeof(text) - 1) < 0);
}

int main(void) {
    int kvm = open("/dev/kvm", O_RDWR);
    int vm = ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM);
    uint64_t create[8] = {4 * PAGE, MMAP_AND_INIT_SHARED};
    int gmem = ioctl(vm, CREATE_GUEST_MEMFD, create);
    char *memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);

    strcpy(memory, "hello");
    printf("%s\n", memory);
    uint64_t region[20] = {(uint64_t)GUEST_MEMFD << 32, 0, 3 * PAGE, 0, 2 * PAGE, gmem}; /* from page 2: one too many */
    if (ioctl(vm, SET_MEMORY_REGION2, region)) perror("bind");
    uint64_t convert[16] = {0, PAGE, PRIVATE};
    if (ioctl(gmem, SET_MEMORY_ATTRIBUTES2, convert)) perror("convert");
    signal(SIGBUS, on_bus_error);
    fflush(stdout);
    printf("%s\n", memory);
}
