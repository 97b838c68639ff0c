/*
 * What our KVM clients share: the ABI that an older <linux/kvm.h> lacks, test cases with TAP output, an access that
 * must end in SIGBUS, and a VM with one vCPU in long mode. No test library: each call is a plain ioctl or system call.
 *
 * A case is a function that CHECKs and returns at the first thing that does not hold. SKIP_CASE says that this machine
 * has not what the case needs.
 */
#ifndef CLIENT_H
#define CLIENT_H

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* The ABI, where the machine's headers are older. */

#ifndef KVM_MEM_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif
#ifndef KVM_SET_USER_MEMORY_REGION2
struct kvm_userspace_memory_region2 {
    __u32 slot, flags;
    __u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    __u32 guest_memfd, pad1;
    __u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif
#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
    __u64 size, flags, reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif
#ifndef KVM_SET_MEMORY_ATTRIBUTES2
struct kvm_memory_attributes2 {
    __u64 offset, size, attributes, flags, error_offset, reserved[11];
};
#define KVM_SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)
#endif
#ifndef KVM_MEMORY_ATTRIBUTE_PRIVATE
#define KVM_MEMORY_ATTRIBUTE_PRIVATE (1ULL << 3)
#endif
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif
#ifndef KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES
#define KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES 252 /* as applied for 7.4 */
#endif
#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM 1
#endif
#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#endif
#ifndef GUEST_MEMFD_FLAG_INIT_SHARED
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#endif

enum { PAGE = 4096, EXIT_SKIP = 4 };

/* Test cases. */

static struct {
    int number, failures;
    bool failed, skipped; /* the case that runs */
    char reason[512];     /* why */
} tap;

__attribute__((format(printf, 1, 2))) static inline void give_reason(const char *format, ...) {
    size_t used = strlen(tap.reason);
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(tap.reason + used, sizeof(tap.reason) - used, format, arguments);
    va_end(arguments);
}

/* In a case: leave it as failed unless `condition` holds; the rest is a printf that says what was seen instead. */
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            give_reason("line %d: %s: ", __LINE__, #condition);                                                        \
            give_reason(__VA_ARGS__);                                                                                  \
            tap.failed = true;                                                                                         \
            return;                                                                                                    \
        }                                                                                                              \
    } while (0)

/* In a case: a call that must return -1 with this errno. */
#define CHECK_ERRNO(call, expected)                                                                                    \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long result_ = (long)(call);                                                                                   \
        int errno_ = errno;                                                                                            \
        CHECK(result_ == -1 && errno_ == (expected), "%s = %ld, errno %d", #call, result_, errno_);                    \
    } while (0)

/* In a case: call a function that CHECKs; leave if it found something. */
#define STEP(call)                                                                                                     \
    do {                                                                                                               \
        call;                                                                                                          \
        if (tap.failed || tap.skipped) {                                                                               \
            give_reason("; from line %d: %s", __LINE__, #call);                                                        \
            return;                                                                                                    \
        }                                                                                                              \
    } while (0)

#define SKIP_CASE(...)                                                                                                 \
    do {                                                                                                               \
        give_reason(__VA_ARGS__);                                                                                      \
        tap.skipped = true;                                                                                            \
        return;                                                                                                        \
    } while (0)

static inline void begin_case(void) {
    tap.failed = tap.skipped = false;
    tap.reason[0] = 0;
    tap.number++;
}

static inline void end_case(const char *group, const char *name) {
    printf("%sok %d - %s%s", tap.failed ? "not " : "", tap.number, group, name);
    if (tap.skipped) printf(" # SKIP %s", tap.reason);
    if (tap.failed) printf("\n# %s", tap.reason);
    printf("\n");
    fflush(stdout);
    tap.failures += tap.failed;
}

/* The plan and the exit code. */
static inline int finish(void) {
    printf("1..%d\n", tap.number);
    return tap.failures ? 1 : 0;
}

struct test_case {
    const char *name;
    void (*run)(void);
};

/* All of them, and the exit code. */
static inline int run_cases(const struct test_case *cases, size_t count) {
    for (size_t i = 0; i < count; i++) {
        begin_case();
        cases[i].run();
        end_case("", cases[i].name);
    }
    return finish();
}

__attribute__((noreturn)) static inline void skip_all(const char *reason) {
    printf("1..0 # SKIP %s\n", reason);
    exit(EXIT_SKIP);
}

__attribute__((noreturn)) static inline void bail_out(const char *what) {
    printf("Bail out! %s: %s\n", what, strerror(errno));
    exit(1);
}

/* An access that the kernel refuses: SIGBUS, with the cause and the address that it gives. */

static sigjmp_buf sigbus_return;
static volatile sig_atomic_t sigbus_code;
static void *volatile sigbus_address;

static inline void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    sigbus_code = info->si_code;
    sigbus_address = info->si_addr;
    siglongjmp(sigbus_return, 1);
}

/* Read (`value` < 0) or write one byte; whether that was refused with SIGBUS. */
static inline bool access_is_refused(volatile uint8_t *byte, int value) {
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO}, former;
    volatile bool refused = false;

    sigaction(SIGBUS, &ours, &former);
    if (sigsetjmp(sigbus_return, 1)) refused = true;
    else if (value < 0) (void)*byte;
    else *byte = (uint8_t)value;
    sigaction(SIGBUS, &former, NULL);
    return refused;
}

/* In a case: reading (value -1) or writing this byte must be SIGBUS, BUS_ADRERR, at its address. */
#define CHECK_SIGBUS(byte, value)                                                                                      \
    do {                                                                                                               \
        volatile uint8_t *byte_ = (byte);                                                                              \
        CHECK(access_is_refused(byte_, value), "no SIGBUS");                                                           \
        CHECK(sigbus_code == BUS_ADRERR, "si_code %d", (int)sigbus_code);                                              \
        CHECK(sigbus_address == (void *)byte_, "si_addr %p, not %p", sigbus_address, (void *)byte_);                   \
    } while (0)

/* KVM. */

static int kvm = -1; /* /dev/kvm, after open_kvm() */

static inline void open_kvm(void) {
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) skip_all("no /dev/kvm");
    if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD) != 1) skip_all("this kernel has no guest_memfd");
}

/* What KVM_CHECK_EXTENSION says; 0 for what this kernel does not know. */
static inline uint64_t capability(int fd, long number) {
    int value = ioctl(fd, KVM_CHECK_EXTENSION, number);

    return value < 0 ? 0 : (uint64_t)value;
}

static inline int create_gmem(int vm, uint64_t size, uint64_t flags) {
    struct kvm_create_guest_memfd arguments = {.size = size, .flags = flags};

    return ioctl(vm, KVM_CREATE_GUEST_MEMFD, &arguments);
}

/* A slot; on `gmem` from its offset 0, unless that is negative. */
static inline int set_region(int vm, uint32_t slot, uint64_t gpa, uint64_t size, void *hva, int gmem) {
    struct kvm_userspace_memory_region2 region = {
        .slot = slot,
        .flags = gmem < 0 ? 0 : KVM_MEM_GUEST_MEMFD,
        .guest_phys_addr = gpa,
        .memory_size = size,
        .userspace_addr = (uint64_t)(uintptr_t)hva,
        .guest_memfd = gmem < 0 ? 0 : (uint32_t)gmem,
    };

    return ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

static inline int punch(int gmem, off_t offset, off_t length) {
    return fallocate(gmem, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length);
}

static inline int allocate(int gmem, off_t offset, off_t length) {
    return fallocate(gmem, FALLOC_FL_KEEP_SIZE, offset, length);
}

static inline void *map_shared(int fd, size_t size) {
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

/*
 * A vCPU in long mode, with the first 2 MiB mapped one to one. Its page tables and its code stand in a slot of ordinary
 * memory; at DATA_GPA the caller puts the memory under test.
 */
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x4000, LOW_SIZE = 0x5000, DATA_GPA = 0x10000 };
enum { LOW_SLOT = 0, DATA_SLOT = 1 };
enum { PTE_PRESENT = 1, PTE_WRITE = 2, PTE_HUGE = 1 << 7 };
enum { CR0_PE = 1, CR0_NE = 1 << 5, CR4_PAE = 1 << 5, EFER_LME = 1 << 8, EFER_LMA = 1 << 10 };
#define CR0_PG (1ULL << 31)

struct machine {
    int vm, vcpu;
    struct kvm_run *run;
    size_t run_size;
    uint8_t *low; /* guest memory from address 0 */
};

static inline int enter_long_mode(int vcpu) {
    struct kvm_segment code = {.limit = ~0U, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = ~0U, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    struct kvm_sregs sregs;

    if (ioctl(vcpu, KVM_GET_SREGS, &sregs)) return -1;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    return ioctl(vcpu, KVM_SET_SREGS, &sregs);
}

/* A VM with its low memory, without a vCPU; -1 with errno if a call fails. */
static inline int begin_machine(struct machine *m, unsigned long type, const void *code, size_t code_size) {
    *m = (struct machine){.vm = ioctl(kvm, KVM_CREATE_VM, type), .vcpu = -1};
    if (m->vm < 0) return -1;
    m->low = mmap(NULL, LOW_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *(uint64_t *)(m->low + PML4) = PDPT | PTE_PRESENT | PTE_WRITE;
    *(uint64_t *)(m->low + PDPT) = PD | PTE_PRESENT | PTE_WRITE;
    *(uint64_t *)(m->low + PD) = PTE_HUGE | PTE_PRESENT | PTE_WRITE;
    memcpy(m->low + CODE, code, code_size);
    return set_region(m->vm, LOW_SLOT, 0, LOW_SIZE, m->low, -1);
}

static inline int add_vcpu(struct machine *m) {
    m->vcpu = ioctl(m->vm, KVM_CREATE_VCPU, 0);
    if (m->vcpu < 0) return -1;
    m->run_size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    m->run = map_shared(m->vcpu, m->run_size);
    return m->run == MAP_FAILED ? -1 : enter_long_mode(m->vcpu);
}

/* Everything but the data slot, for this type of VM; -1 with errno if a call fails. Protected VMs are initialised before
 * they get a vCPU: begin_machine, then add_vcpu. */
static inline int open_machine(struct machine *m, unsigned long type, const void *code, size_t code_size) {
    return begin_machine(m, type, code, code_size) ? -1 : add_vcpu(m);
}

static inline void close_machine(struct machine *m) {
    munmap(m->run, m->run_size);
    close(m->vcpu);
    close(m->vm);
    munmap(m->low, LOW_SIZE);
}

/*
 * Run the code from its first byte, with these values in RBX and RCX, to its first OUT; whether that is what happened.
 * *byte is what it gave out.
 */
static inline bool run_guest(struct machine *m, uint64_t rbx, uint64_t rcx, uint8_t *byte) {
    struct kvm_regs regs = {.rip = CODE, .rbx = rbx, .rcx = rcx, .rflags = 2};
    int result;

    if (ioctl(m->vcpu, KVM_SET_REGS, &regs)) return false;
    do {
        result = ioctl(m->vcpu, KVM_RUN, 0);
    } while (result == -1 && errno == EINTR);
    if (result || m->run->exit_reason != KVM_EXIT_IO || m->run->io.direction != KVM_EXIT_IO_OUT) return false;
    *byte = *((uint8_t *)m->run + m->run->io.data_offset);
    return true;
}

#endif
