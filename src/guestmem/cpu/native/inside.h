/* What the parts of the library know of each other. */
#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <unicorn/unicorn.h>

#include "cpu.h"
#include "unicorn_state.h"

enum { PAGE_SHIFT = 12, PAGE = 4096 };
#define PAGE_MASK (~(uint64_t)(PAGE - 1))

/* ---- registers and bits */

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
enum { ES, CS, SS, DS, FS, GS };

#define CR0_PE (1ULL << 0)
#define CR0_WP (1ULL << 16)
#define CR0_PG (1ULL << 31)
#define CR4_PSE (1ULL << 4)
#define CR4_PAE (1ULL << 5)
#define CR4_OSFXSR (1ULL << 9)
#define CR4_LA57 (1ULL << 12)
#define CR4_SMEP (1ULL << 20)
#define CR4_SMAP (1ULL << 21)
#define EFER_SCE (1ULL << 0)
#define EFER_LME (1ULL << 8)
#define EFER_LMA (1ULL << 10)
#define EFER_NXE (1ULL << 11)
#define RFLAGS_TF (1ULL << 8)
#define RFLAGS_IF (1ULL << 9)
#define RFLAGS_DF (1ULL << 10)
#define RFLAGS_NT (1ULL << 14)
#define RFLAGS_RF (1ULL << 16)
#define RFLAGS_VM (1ULL << 17)
#define RFLAGS_AC (1ULL << 18)
#define DR6_BS (1ULL << 14)

enum { DB = 1, NMI = 2, BP = 3, OF = 4, UD = 6, NM = 7, DF = 8, TS = 10, NP = 11, SS_FAULT = 12, GP = 13, PF = 14, VC = 29 };
enum { PF_PRESENT = 1, PF_WRITE = 2, PF_USER = 4, PF_RESERVED = 8, PF_FETCH = 16 };

/* hflags: QEMU's digest of the mode. HF_GUEST and HF_IOBPT are ours: see run.c and port_io.c. */
enum {
    HF_CPL = 3,
    HF_INHIBIT_IRQ = 1 << 3,
    HF_CS32 = 1 << 4,
    HF_SS32 = 1 << 5,
    HF_ADDSEG = 1 << 6,
    HF_PE = 1 << 7,
    HF_FPU = 7 << 9,
    HF_LMA = 1 << 14,
    HF_CS64 = 1 << 15,
    HF_GUEST = 1 << 21,
    HF_OSFXSR = 1 << 22,
    HF_SMAP = 1 << 23,
    HF_IOBPT = 1 << 24,
    HF2_GIF = 1 << 0,
    HF2_NMI = 1 << 2,
    HF2_VINTR = 1 << 3,
};
enum { DESC_L = 1 << 21, DESC_B = 1 << 22, DESC_P = 1 << 15 };

/* ---- what a pass of Unicorn has met */

enum access { READ, WRITE, FETCH };

/* Why an access was refused. */
enum refusal {
    NOT_REFUSED,
    REFUSED_STAGE2, /* no leaf: gpa, write, fetch, kind (enum cpu_access) */
    REFUSED_GUEST,  /* an exception of the guest: vector, error_code, address */
    REFUSED_HOST,   /* the host would not let it be touched: gpa, hva, write, host_signal */
    REFUSED_CODE,   /* code has changed: the translations go, and it is tried again */
    REFUSED_MMIO,   /* no memory: gpa, write, fetch; the instruction is to be executed by mmio.c */
};

struct refused {
    enum refusal why;
    uint64_t gpa, hva, address;
    uint32_t error_code;
    uint8_t vector, write, fetch, kind, host_signal;
    bool whole_page; /* gpa is the page's, the offset is the linear address's */
};

/* Why a hook has ended the pass; the first wins. */
enum cause { NO_CAUSE, CAUSE_PORT_OUT, CAUSE_PORT_IN, CAUSE_PORT_IN_DONE, CAUSE_PORT_REFUSED, CAUSE_SYSCALL, CAUSE_SYSENTER,
             CAUSE_MMIO_READ, CAUSE_MMIO_CROSSED };

/* An exception, an interrupt from outside, or an INT instruction of `length` bytes that RIP is past. */
struct event {
    bool present;
    uint8_t vector;
    uint8_t length;   /* of a software interrupt */
    bool external;
    uint32_t error_code;
    uint64_t address; /* CR2 of a page fault */
};

static inline bool event_is_exception(const struct event *event)
{
    return !event->length && !event->external;
}

/* ---- a CPU. Only its own thread touches it, but for what is marked. */

struct port_io {
    uint16_t port;
    uint32_t size;
    uint32_t value;
    uint64_t rax, rsi, rdi, rip, rflags;  /* before the instruction */
    uint32_t hflags;
    uint64_t dr0, dr6, dr7;
    uint64_t next;           /* RIP after it */
    bool string;             /* INS */
    struct refused refused;  /* of CAUSE_PORT_REFUSED */
    uint64_t supply_rip;     /* the INS that takes values from the answer */
    uint32_t supply_at, supply_end;
};

enum { MMIO_PAGES = 4, MMIO_VALUES = 16, MMIO_WRITES = 16 };

struct mmio_write {
    uint64_t gpa, value;
    uint32_t size;
};

/* One instruction that uses MMIO. */
struct mmio {
    bool active;
    bool mapped, hooked;
    bool aborted;
    uc_hook hook;
    uint64_t values[MMIO_VALUES]; /* that reads were given so far */
    unsigned value_count, next;
    uint64_t image_gpa, image_value; /* the access under way */
    uint32_t image_size;
    struct mmio_write writes[MMIO_WRITES];
    unsigned write_count, write_next; /* those not reported yet: write_next .. write_count */
    struct mmio_write read; /* what the read that ended the step wants */
};

struct cpu {
    uc_engine *uc;
    struct cpu_space *space;
    struct cpu_block *block;
    struct unicorn_state at; /* where Unicorn has its CPU: at.env, at.msrs, at.tail, at.pass_end, ... */

    /* a pass */
    enum cause cause;
    struct refused refused;
    enum access refused_access; /* of the fill that was refused */
    uint64_t fault_address;     /* the linear address whose fill was refused */
    int exception;              /* of the last pass */
    bool emulating, sealed;
    uint64_t call_start;        /* RIP of the last guest call (guest_calls.c) */
    uint8_t call_length;
    bool call_address_size;

    struct event pending;       /* delivered before anything else is executed */
    int interrupt;              /* vector that waits, or -1 */
    bool nmi;                   /* an NMI waits */
    bool debug_step;            /* guest_debug wants single steps */
    uc_hook watch;              /* of breakpoints on data, if watching: debug.c */
    bool watching;
    uint8_t watch_hits;         /* which the instruction has touched */
    int next_stop;              /* what settling met, for the next run; CPU_STOP_NONE */
    struct port_io port;
    struct mmio mmio;
    uint64_t physical_mask;     /* bits of an address, from CPUID */

    /* TLB: tlb.c */
    uint64_t seen_generation;
    unsigned fills, entries;
    struct { uint64_t linear, hva; } fetched[64]; /* pages that were fetched since the flush, by linear address */

    /* code: code.c */
    struct code_page *live[4]; /* fetched from since the last flush; compared when a run begins */
    unsigned live_count;       /* more than 4: too many to compare */

    /* faults of the host: fault.c */
    sigjmp_buf *guard;          /* where our own touch of guest memory goes on */
    uint64_t host_fault;        /* address, and signal */
    uint8_t host_signal, host_write;
    bool find_gpa;              /* a step that only looks for the page of host_fault */
    uint64_t touching;          /* the guest page that we touch ourselves */

    /* shared with other threads, atomic */
    uint32_t in_guest;
    uint32_t slice_over;        /* look: at the generation, at signals, at who waits */
    uint32_t flush_wanted;      /* its grants to write are to be gone: code.c */
    uint32_t code_stale;        /* what it has translated is to be gone */
    uint32_t parked;            /* inside of a fill, waiting for another CPU: it executes nothing */
    uint32_t kicked;
    uint32_t stepping;          /* a pass of one instruction: not to be interrupted */
    uint64_t watched_signals;
    unsigned number;            /* bit of the space's masks */
    unsigned place;             /* among those that run, from 1; 0: none yet */
    unsigned ticks;             /* since the run began; the ticker's */
    struct cpu *next;           /* of the space. By its lock */
};

extern _Thread_local struct cpu *current; /* the CPU that this thread runs */

/* ---- run.c */

int cpu_emulate(struct cpu *cpu);                /* a pass; Unicorn's error */
int cpu_step(struct cpu *cpu);                   /* a pass of one instruction, alone in the world if it must be */
struct cpu_stop *stop_begin(struct cpu *cpu, enum cpu_stop_kind kind); /* all of it but `data` is 0 */
int cpu_judge(struct cpu *cpu, int code, bool stepped); /* the stop (written to the block), or CPU_STOP_NONE: go on */
int stop_not_done(struct cpu *cpu, const struct refused *why); /* an instruction that was rolled back: the stop or NONE */
int stop_failed(struct cpu *cpu, const char *why);
void trap_if_traced(struct cpu *cpu);            /* RFLAGS.TF: #DB follows the instruction that was just completed */
void instruction_done(struct cpu *cpu);          /* the shadow and RF last for one instruction */
void pend(struct cpu *cpu, uint8_t vector, uint32_t error_code);
uint64_t linear_rip(const struct cpu *cpu);
void sealed_pass(struct cpu *cpu);               /* nothing happens; Unicorn lets go of hooks that were deleted */

/* ---- state.c: between block and Unicorn */

void state_load(struct cpu *cpu, uint32_t groups); /* dirty ones of the block into the CPU */
void state_store(struct cpu *cpu);                 /* all of it into the block */
void update_hflags(struct cpu *cpu);               /* from segments, control registers, EFER */
bool state_hooks(struct cpu *cpu);                 /* CPUID, RDTSC, RDTSCP */

/* ---- fpu.c */

bool fpu_find(struct cpu *cpu);  /* where Unicorn has it */
void fpu_reset(struct cpu_block *block);
void fpu_load(struct cpu *cpu);
void fpu_store(struct cpu *cpu);

/* ---- msrs.c */

/* RDMSR or WRMSR at RIP: done, or an exception pends, or the stop that asks (RDMSR, WRMSR). */
int msr_instruction(struct cpu *cpu);
void msr_finish(struct cpu *cpu, uint64_t value); /* the answer to it; RIP moves past */
uint64_t cpu_tsc(const struct cpu_block *block);
void msrs_reset(struct cpu_block *block);
void msrs_load(struct cpu *cpu);  /* those that Unicorn's CPU has while it runs */
void msrs_store(struct cpu *cpu);
uint64_t *msr_place(struct cpu_block *block, uint32_t index); /* in block->msrs, or NULL */

/* ---- cpuid.c */

void cpuid_lookup(const struct cpu_block *block, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);

/* ---- linear.c: memory as the CPU itself reaches it (descriptor tables, frames, code), as a supervisor unless said */

bool linear_read(struct cpu *cpu, uint64_t linear, void *data, uint32_t size);  /* false: cpu->refused says why */
bool linear_write(struct cpu *cpu, uint64_t linear, const void *data, uint32_t size);
bool linear_code(struct cpu *cpu, uint64_t linear, void *data, uint32_t size);  /* a fetch, at the guest's own CPL */
/* The page of `linear` for a read by the guest's CPL: its gpa and kind (enum cpu_access). */
bool linear_page(struct cpu *cpu, uint64_t linear, uint64_t *gpa, uint8_t *kind);

/* ---- walk.c */

struct paging {
    uint64_t cr0, cr3, cr4, efer;
    uint64_t bit, no_table, address, reserved; /* page bit; bits that no entry with a table under it has; ... */
    bool set_is_private, ac;
    uint8_t cpl;
};

struct page {
    uint64_t gpa;
    uint8_t kind; /* enum cpu_access */
    bool readable, writable, executable;
};

void paging_of(const struct cpu *cpu, struct paging *paging);
void paging_implicit(struct paging *paging);
bool walk(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access, struct page *page);

/* ---- space.c */

struct leaf_found {
    uint64_t hva; /* of the 4K page */
    bool writable;
    bool mmio; /* no memory; or, with an hva, memory whose writes are MMIO */
};

bool space_lookup(struct cpu_space *space, uint64_t gfn, uint8_t kind, struct leaf_found *found);
void space_add(struct cpu_space *space, struct cpu *cpu);
void space_remove(struct cpu_space *space, struct cpu *cpu);
struct cpu *space_cpus(struct cpu_space *space);
uint64_t space_generation(const struct cpu_space *space);

/* ---- tlb.c */

bool tlb_hook(struct cpu *cpu);
void tlb_flush(struct cpu *cpu);      /* translations of addresses */
void tlb_flush_code(struct cpu *cpu); /* and of code */
void tlb_look(struct cpu *cpu);       /* at a boundary: what others have asked for */
#define MMIO_BASE (1ULL << 51)        /* of the area in which pages of MMIO stand at their guest-physical address */

/* ---- code.c: who has translated code of a page, and who may write it */

struct code_table;

struct code_table *code_table_create(void);
void code_table_destroy(struct code_table *table);
struct code_table *space_code(struct cpu_space *space);
bool code_fetched(struct cpu *cpu, uint64_t linear, uint64_t hva); /* false: REFUSED_CODE */
bool code_may_write(struct cpu *cpu, uint64_t linear, uint64_t hva, bool writes); /* false, and not `writes`: do not grant it */
void code_forget(struct cpu *cpu);     /* all its translations are gone */
void code_tlb_flushed(struct cpu *cpu);
bool code_unchanged(struct cpu *cpu);  /* what it executes has not been written by the host since the last run */
void code_run_ended(struct cpu *cpu);

/* ---- delivery.c */

/* Enter the guest's handler of cpu->pending. NONE: entered; else the stop (a miss, SHUTDOWN, FAILED), to be repeated. */
int deliver(struct cpu *cpu);
bool has_error_code(uint8_t vector);
void segment_load(struct segment_cache *segment, uint32_t selector, uint64_t descriptor);

/* ---- port_io.c, mmio.c, fast_calls.c, guest_calls.c */

bool port_hooks(struct cpu *cpu);
int port_out_done(struct cpu *cpu);      /* after CAUSE_PORT_OUT: the stop */
int port_in_stop(struct cpu *cpu);       /* after CAUSE_PORT_IN: rolled back, the stop that asks */
int port_in_done(struct cpu *cpu);       /* after CAUSE_PORT_IN_DONE */
int port_refused(struct cpu *cpu);       /* after CAUSE_PORT_REFUSED */
int port_answer(struct cpu *cpu);        /* block->answer for what was rolled back; what its last part met, or NONE */
bool fast_call_hooks(struct cpu *cpu);
void fast_call(struct cpu *cpu, bool syscall);
int guest_call(struct cpu *cpu);         /* an instruction that Unicorn does not know: its stop, or #UD pends */
void guest_call_finish(struct cpu *cpu, uint32_t kind, uint64_t value);
int mmio_advance(struct cpu *cpu);       /* one step of an instruction that uses MMIO */
void mmio_begin_instruction(struct cpu *cpu); /* the access that was refused is to be made as MMIO */
void mmio_supply(struct cpu *cpu, uint64_t value);
int mmio_next_write(struct cpu *cpu);    /* MMIO_WRITE with the oldest that was not reported, or NONE */
void mmio_forget(struct cpu *cpu);
void mmio_release(struct cpu *cpu);

/* ---- decode.c */

enum { INSTRUCTION_MAX = 15 };

struct instruction {
    uint8_t bytes[INSTRUCTION_MAX];
    uint8_t got;    /* how many of them were read */
    uint8_t opcode; /* where the prefixes end */
    uint8_t repeat; /* F2, F3 or 0 */
    bool operand_size, address_size;
};

/* False: it cannot be fetched (cpu->refused says why), or it is too long. */
bool decode(struct cpu *cpu, struct instruction *instruction);                         /* prefixes, and a byte */
bool decode_more(struct cpu *cpu, struct instruction *instruction, unsigned count);    /* the first `count` bytes */

/* ---- general.c */

bool is_refused_as_sse(struct cpu *cpu); /* what stands at RIP, of which it is no part */
int step_as_general(struct cpu *cpu, int (*step)(struct cpu *cpu));

/* ---- debug.c: what block->guest_debug asks for */

bool debug_wants_step(struct cpu *cpu);
bool debug_blocks_interrupts(struct cpu *cpu);
void debug_release(struct cpu *cpu);       /* no step follows */
int debug_before_step(struct cpu *cpu);    /* the stop or NONE */
int debug_after_step(struct cpu *cpu);     /* of an instruction, or of a delivery */
int debug_before_delivery(struct cpu *cpu); /* of cpu->pending; the stop or NONE */

/* ---- atomic.c */

bool locks_at_rip(struct cpu *cpu);

/* ---- fault.c */

enum { EXIT_ATOMIC = 0x1fd, EXIT_HOST_FAULT = 0x1fe }; /* exceptions of ours, beside QEMU's */

/* ---- modes.c: slices, serial, parallel */

extern enum cpu_mode mode;
void world_enter(struct cpu *cpu);
void world_leave(struct cpu *cpu);
void world_yield(struct cpu *cpu);     /* at a boundary */
bool world_stop(struct cpu *cpu);      /* alone from here on until world_go(); false: kicked meanwhile */
void world_go(struct cpu *cpu);
void kick(struct cpu *cpu);            /* have it come to a boundary soon */
void ticker_enter(struct cpu *cpu);
void ticker_leave(struct cpu *cpu);
bool signals_wait(const struct cpu *cpu);
