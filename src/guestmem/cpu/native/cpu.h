/* A virtual x86-64 CPU: what the library offers. It executes guest code in the thread that calls cpu_run(), on memory of
 * the process that it is in, and knows nothing of KVM, of memslots or of guest_memfd: what needs one of them is a stop.
 *
 * guestmem's Python engine uses it, by ctypes, in its own process; a preloaded shim could in a client's.
 *
 * A CPU's state lies in its block, which the process that executes and the one that steers may share. Whenever the CPU is
 * not inside of cpu_run() the block is the truth: who steers reads it, writes it, and says in `dirty` which groups it
 * wrote. The structures are KVM's own, so that KVM_GET_REGS is a copy. */
#pragma once

#include <linux/kvm.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#define CPU_EXPORT __attribute__((visibility("default")))

enum { CPU_ABI = 1 };

/* ---- stops: why cpu_run() came back. State is exact at each: unless a stop says that its instruction is complete, running
 * again repeats it. */
enum cpu_stop_kind {
    CPU_STOP_NONE,
    CPU_STOP_SLICE,      /* the slice is over (cpu_set_slices), between two instructions */
    CPU_STOP_KICKED,     /* cpu_kick(), between two instructions */
    CPU_STOP_SIGNAL,     /* a signal waits that cpu_watch_signals() asked for, between two instructions */
    CPU_STOP_MISS,       /* no leaf for gpa, write, fetch, access: cpu_space_map() it and run again */
    CPU_STOP_HOST_FAULT, /* the leaf's memory cannot be touched: gpa, hva, write; host_signal says how the host refused */
    CPU_STOP_PORT_OUT,   /* port, size, count, data; complete */
    CPU_STOP_PORT_IN,    /* port, size, count; an answer finishes it */
    CPU_STOP_MMIO_READ,  /* gpa, size; an answer finishes it */
    CPU_STOP_MMIO_WRITE, /* gpa, size, data; complete, or run again for the rest of it */
    CPU_STOP_HALT,       /* complete */
    CPU_STOP_WINDOW,     /* the guest would take an interrupt now, and request_interrupt_window asks to know */
    CPU_STOP_RDMSR,      /* nr, in stop_msrs or unknown with CPU_MSR_STOP_UNKNOWN; an answer finishes it */
    CPU_STOP_WRMSR,      /* nr, value[0]; likewise, the answer's value is ignored */
    CPU_STOP_HYPERCALL,  /* nr is RAX, value[] RBX RCX RDX RSI, cpl; past the instruction, the answer goes to RAX */
    CPU_STOP_PVALIDATE,  /* gpa, large, validate; at the instruction; answer: EAX, RFLAGS.CF in bit 32 */
    CPU_STOP_RMPADJUST,  /* gpa, large, value[0] is RDX; at the instruction; answer: EAX */
    CPU_STOP_VMGEXIT,    /* value[0] is the GHCB MSR; past the instruction; answer: its new value */
    CPU_STOP_TDCALL,     /* nr is RAX; at the instruction; answer: RAX */
    CPU_STOP_DEBUG,      /* guest_debug asked: nr is the vector (1 or 3), value[0] the linear RIP, value[1] DR6, value[2] DR7 */
    CPU_STOP_SHUTDOWN,   /* triple fault */
    CPU_STOP_FAILED,     /* what stands at RIP cannot be executed: why */
};

/* Which kind of page the guest itself asserts by a bit of its page tables, cf. cpu_block.page_bit. */
enum cpu_access { CPU_ACCESS_SHARED, CPU_ACCESS_PRIVATE, CPU_ACCESS_ANY };

enum { CPU_STOP_DATA = 4096 }; /* port data of one stop at most */

struct cpu_stop {
    uint32_t kind;
    uint32_t size, count;
    uint16_t port;
    uint8_t write, fetch, access, large, validate, cpl;
    uint8_t host_signal; /* SIGSEGV or SIGBUS */
    uint8_t reserved[3];
    uint64_t gpa, hva, nr;
    uint64_t value[4];
    char why[64];
    uint8_t data[CPU_STOP_DATA]; /* of PORT_OUT, MMIO_WRITE (8 bytes at most) */
};

/* What is done about the last stop when cpu_run() is entered next, or by cpu_settle(). */
enum cpu_answer_kind {
    CPU_ANSWER_NONE,
    CPU_ANSWER_VALUE,
    CPU_ANSWER_RAISE,
    CPU_ANSWER_MMIO, /* to MISS: what the stopped instruction does to the page of `value` (a gpa) is MMIO, whatever leaf there
                        is for other kinds of access: memory that is read-only is read, and written as MMIO */
};

struct cpu_answer {
    uint32_t kind;
    uint32_t vector, error_code; /* RAISE: the stopped instruction raises this exception instead */
    uint32_t reserved;
    uint64_t value;              /* VALUE; of PORT_IN and MMIO_READ in data */
    uint8_t data[CPU_STOP_DATA];
};

/* ---- the block */

/* Groups of state, for `dirty`. */
enum cpu_group {
    CPU_REGS = 1 << 0,
    CPU_SREGS = 1 << 1,
    CPU_FPU = 1 << 2, /* xsave, xcr0 */
    CPU_DEBUG = 1 << 3,
    CPU_EVENTS = 1 << 4,
    CPU_MSRS = 1 << 5,
    CPU_CPUID = 1 << 6,
    CPU_CONTROL = 1 << 7, /* page_bit, guest_kind, guest_debug, msr_mode, stop_msrs */
    CPU_ALL = 0xff,
};

enum { CPU_CPUID_MAX = 256, CPU_MSRS_MAX = 256, CPU_STOP_MSRS_MAX = 32 };
enum cpu_guest_kind { CPU_GUEST_PLAIN, CPU_GUEST_SNP, CPU_GUEST_TD };
enum cpu_msr_mode { CPU_MSR_STOP_UNKNOWN = 1 };

struct cpu_msr {
    uint32_t index, present;
    uint64_t value;
};

struct cpu_msr_range {
    uint32_t first, count;
    uint32_t reads, writes; /* which of the two stop */
};

struct cpu_block {
    uint32_t abi, size; /* CPU_ABI, sizeof(struct cpu_block) */
    uint32_t dirty;     /* groups that who steers has written */

    /* control */
    uint8_t request_interrupt_window;
    uint8_t guest_kind;
    uint8_t page_bit; /* its position; 0: entries have none. Set: private for SNP, shared for a TD */
    uint8_t msr_mode;
    uint32_t stop_msrs_count;
    struct cpu_msr_range stop_msrs[CPU_STOP_MSRS_MAX];
    struct kvm_guest_debug guest_debug;
    int64_t tsc_offset; /* the TSC is CLOCK_MONOTONIC in ns, and this */

    /* state */
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_debugregs debug;
    struct kvm_vcpu_events events;
    uint64_t xcr0;
    uint8_t xsave[4096];
    struct cpu_msr msrs[CPU_MSRS_MAX]; /* by the library alone: cpu_msr_get(), cpu_msr_set() */
    uint32_t cpuid_count;
    struct kvm_cpuid_entry2 cpuid[CPU_CPUID_MAX];

    struct cpu_stop stop;
    struct cpu_answer answer;

    /* what happened, for who looks */
    uint64_t runs, fills, misses, deliveries, host_faults, slices, code_flushes, exclusive;
};

/* The state after reset, and the CPU's own CPUID. */
CPU_EXPORT void cpu_block_init(struct cpu_block *block);

/* MSRs of a CPU that is not running; false: no such register, or not this value. */
CPU_EXPORT bool cpu_msr_get(struct cpu_block *block, uint32_t index, uint64_t *value);
CPU_EXPORT bool cpu_msr_set(struct cpu_block *block, uint32_t index, uint64_t value);
CPU_EXPORT bool cpu_takes_interrupts(const struct cpu_block *block); /* now, if one came */

/* ---- stage 2: the leaves of one VM in this process. Frames are without the page bit. */

struct cpu_space;

CPU_EXPORT struct cpu_space *cpu_space_create(void);
CPU_EXPORT void cpu_space_destroy(struct cpu_space *space);

/* Frames gfn .. gfn + count are memory of this process from hva on. `kinds` is a mask of 1 << CPU_ACCESS_SHARED and 1 <<
 * CPU_ACCESS_PRIVATE. Replaces what was there. ENOMEM. */
CPU_EXPORT int cpu_space_map(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t hva,
                             bool writable);

/* Frames that are no memory: an access stops as MMIO without a miss. */
CPU_EXPORT int cpu_space_map_mmio(struct cpu_space *space, uint64_t gfn, uint64_t count);

/* Leaves go. With `wait` no CPU of the space can reach them when this returns, but one whose thread makes this call; without,
 * a CPU may do so until its next instruction boundary at which it looks, or a fault of the host. */
CPU_EXPORT void cpu_space_drop(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, bool wait);

/* ---- a CPU */

struct cpu;

/* NULL with errno: ENOMEM, EINVAL (another ABI), ENOSYS (a Unicorn that does not fit: cpu_last_error). The block stays the
 * caller's. */
CPU_EXPORT struct cpu *cpu_create(struct cpu_space *space, struct cpu_block *block);
CPU_EXPORT void cpu_destroy(struct cpu *cpu);
CPU_EXPORT const char *cpu_last_error(void);

/* Answers the last stop if block->answer says so, then executes until a stop; its kind, the rest in block->stop. */
CPU_EXPORT int cpu_run(struct cpu *cpu);
/* Only answers it: the instruction is finished, and the block is as after a stop. What that met (a second access, a miss) is
 * what cpu_run() returns next. */
CPU_EXPORT void cpu_settle(struct cpu *cpu);
/* Have the CPU stop with KICKED soon: from any thread, and from a signal handler. */
CPU_EXPORT void cpu_kick(struct cpu *cpu);

/* ---- how they run, for all CPUs of the process */

/* Slices of a millisecond and one CPU at a time (deterministic to who steers, and what a server wants that serialises
 * vCPUs itself), or all at once with exact atomics. Before the first CPU is made. */
enum cpu_mode { CPU_MODE_SLICES, CPU_MODE_SERIAL, CPU_MODE_PARALLEL };
CPU_EXPORT void cpu_set_mode(enum cpu_mode mode);

/* Signals that end this thread's runs while they are blocked and pending; 0 for none. */
CPU_EXPORT void cpu_watch_signals(struct cpu *cpu, uint64_t mask);

/* SIGSEGV and SIGBUS below a guest's access. Who has handlers of his own calls cpu_handle_fault() first, which does not
 * return if the fault was a guest's; without, cpu_install_handlers() sets some that pass on what is not. */
CPU_EXPORT bool cpu_handle_fault(int signal, siginfo_t *info, void *context);
CPU_EXPORT void cpu_install_handlers(void);
