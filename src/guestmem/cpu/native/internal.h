/* What the files of the library share: one CPU, the leaves of a VM, and who calls whom. */
#pragma once

#include "cpu.h"
#include "layout.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>

enum { PAGE = 4096 };
#define PAGE_MASK (~(uint64_t)(PAGE - 1))

/* Of QEMU's digest of the mode (hflags). GUEST and IOBPT are ours, see pass.c and port_io.c. */
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

enum {
    CR0_PE = 1 << 0,
    CR0_WP = 1 << 16,
    CR4_PSE = 1 << 4,
    CR4_PAE = 1 << 5,
    CR4_OSFXSR = 1 << 9,
    CR4_LA57 = 1 << 12,
    CR4_OSXSAVE = 1 << 18,
    CR4_SMEP = 1 << 20,
    CR4_SMAP = 1 << 21,
    EFER_SCE = 1 << 0,
    EFER_LME = 1 << 8,
    EFER_LMA = 1 << 10,
    EFER_NXE = 1 << 11,
};
#define CR0_PG (1ull << 31)

enum {
    RFLAGS_CF = 1 << 0,
    RFLAGS_PF = 1 << 2,
    RFLAGS_AF = 1 << 4,
    RFLAGS_ZF = 1 << 6,
    RFLAGS_SF = 1 << 7,
    RFLAGS_TF = 1 << 8,
    RFLAGS_IF = 1 << 9,
    RFLAGS_DF = 1 << 10,
    RFLAGS_OF = 1 << 11,
    RFLAGS_NT = 1 << 14,
    RFLAGS_RF = 1 << 16,
    RFLAGS_VM = 1 << 17,
    RFLAGS_AC = 1 << 18,
};

/* The second word of a segment descriptor. */
enum {
    DESC_CODE = 1 << 11,
    DESC_CONFORMING = 1 << 10,
    DESC_S = 1 << 12,
    DESC_DPL_SHIFT = 13,
    DESC_P = 1 << 15,
    DESC_L = 1 << 21,
    DESC_B = 1 << 22,
    DESC_G = 1 << 23,
};

enum { DB = 1, NMI = 2, BP = 3, OF = 4, UD = 6, DF = 8, TS = 10, NP = 11, SS_FAULT = 12, GP = 13, PF = 14, VC = 29 };
enum { DR6_BS = 1 << 14 };

/* An exception, an interrupt from outside, or an INT instruction of `length` bytes that RIP is past. */
struct event {
    int vector; /* -1: none */
    uint32_t error_code;
    int length;
    bool external;
    uint64_t address; /* CR2 of a page fault */
};

enum access_kind { READ = 16, WRITE = 17, FETCH = 18 }; /* as Unicorn's fill hook has them: UC_MEM_READ... */

enum refusal_kind { NOT_REFUSED, REFUSED_STAGE2, REFUSED_MMIO, REFUSED_GUEST, REFUSED_HOST };

/* Why an access did not happen. */
struct refusal {
    enum refusal_kind kind;
    enum access_kind asked; /* what the guest wanted of the page */
    bool write, fetch, whole_page;
    uint8_t access; /* enum cpu_access */
    int vector;
    uint32_t error_code;
    uint64_t gpa, address, hva;
};

/* Which hook ended the pass. */
enum cause {
    CAUSE_NONE,
    CAUSE_PORT_OUT,
    CAUSE_PORT_IN,
    CAUSE_PORT_IN_DONE,
    CAUSE_PORT_REFUSED,
    CAUSE_SYSCALL,
    CAUSE_SYSENTER,
    CAUSE_MMIO_READ,
    CAUSE_MMIO_CROSSED,
};

/* A guest page as the guest's own tables have it, and what may be done there without another walk. */
struct guest_page {
    uint64_t gpa;
    bool readable, writable, executable;
    uint8_t access; /* enum cpu_access */
};

/* What a translation depends on besides the tables. */
struct paging {
    uint64_t cr0, cr3, cr4, efer;
    unsigned cpl;
    bool ac;
};

/* One leaf of stage 2. */
struct leaf {
    uint64_t hva;
    bool present, writable, mmio;
};

struct mmio_access {
    uint64_t gpa, value;
    unsigned size;
};

enum { MMIO_PAGES = 4, MMIO_VALUES = 16, MMIO_WRITES = 8, LIVE_PAGES = 4, MESSAGES = 16 };
#define MMIO_BASE (1ull << 51)

struct mmio {
    uint64_t pages[MMIO_PAGES];
    unsigned page_count;
    uint64_t values[MMIO_VALUES];
    unsigned value_count, value_next;
    struct mmio_access image;                /* the access that is under way */
    struct mmio_access writes[MMIO_WRITES];  /* not reported yet */
    unsigned write_count, write_next;
    bool mapped, hooked, aborted;
    uc_hook hook;
    uint8_t saved[ENV_SIZE];
};

struct port_io {
    uint64_t rax, rsi, rdi, rip, rflags; /* before the instruction */
    uint32_t hflags;
    uint64_t dr0, dr6, dr7;
    uint64_t next;
    bool string;
    uint16_t port;
    unsigned size;
    uint32_t value;
    uint64_t supply_rip;
    unsigned supply_size, supply_next; /* bytes of `supply` that an INS at supply_rip is to take */
    uint8_t supply[CPU_STOP_DATA];
};

/* What was asked of somebody else by the last stop, and what an answer needs to know. */
struct question {
    int kind; /* enum cpu_stop_kind */
    uint64_t start; /* RIP of the instruction */
    unsigned length, size;
};

enum { KICK_USER = 1, KICK_TICK = 2, KICK_WORK = 4 };

/* Another CPU is about to write the page; is about to execute it; has just stopped writing it. */
enum code_request { DROP_CODE, DROP_GRANT, RECHECK };

/* What other CPUs ask this one to do about code, see code_messages.c. */
struct inbox {
    pthread_mutex_t lock; /* of all but `handled`; no guest memory is touched under it */
    struct {
        uint64_t hva;
        enum code_request request;
    } messages[MESSAGES];
    unsigned count;
    bool overflow;
    uint64_t posted;
    _Atomic uint64_t handled;
};

struct cpu {
    struct uc_view;
    uc_engine *uc;
    struct cpu_space *space;
    struct cpu_block *block;
    unsigned index;      /* its bit in masks of CPUs */
    struct cpu *next_in_space, *next_in_process;

    /* one pass */
    enum cause cause;
    struct refusal refused;
    bool stepping, sealed, translating, in_pass;
    sigjmp_buf *guard; /* where a fault of the host goes while the library itself touches guest memory */
    uint64_t fault_hva;
    uint8_t fault_signal;
    uint64_t probe_hva, probe_offset; /* the page whose fill is looked for, 0: none. See fault.c */

    /* the guest's */
    struct event pending;
    int interrupt; /* the vector that waits, or -1 */
    bool nmi;
    struct question asked;
    bool step_done;        /* guest_debug: the next round stops */
    bool watch_step;       /* a breakpoint on data was hit, and is not to end this step */
    unsigned watch_hits;   /* bits of DR6 */
    bool host_breakpoints; /* guest_debug: DR0 to DR3 and DR7 are the host's */
    int next; /* a stop that was met while an answer was completed, and lies in block->stop */
    uint64_t physical_mask;
    struct mmio mmio;
    struct port_io ports;

    /* stage 2 and code */
    uint64_t seen_generation;
    unsigned fill_count, tlb_entries;
    uint64_t live[LIVE_PAGES];
    unsigned live_count;
    struct code_map *code; /* what is translated, by host page */
    struct inbox inbox;

    /* others; atomics */
    _Atomic uint32_t kicks;
    _Atomic uint32_t in_guest;
    _Atomic uint32_t inside; /* of cpu_run() or cpu_settle() */
    _Atomic bool out;        /* inside, but not in the guest: kicked while another CPU is alone */
    _Atomic uint64_t run_serial;
    uint64_t ticked_serial; /* the ticker's */
    uint64_t watched_signals;
};

extern __thread struct cpu *current_cpu;
extern enum cpu_mode cpu_mode;

__attribute__((format(printf, 1, 2))) void set_error(const char *format, ...);

/* run.c */
int advance(struct cpu *cpu);
int step(struct cpu *cpu); /* the instruction at RIP once more, by itself: its stop, or 0 */
int single_step(struct cpu *cpu); /* Unicorn's error of a pass of one instruction */
int judge(struct cpu *cpu, int code, bool stepped);
int not_done(struct cpu *cpu); /* the stop for `refused`, or 0 with an exception pending */
__attribute__((format(printf, 2, 3))) int fail(struct cpu *cpu, const char *why, ...);
void trap_if_traced(struct cpu *cpu);
void raise_event(struct cpu *cpu, int vector, uint32_t error_code, uint64_t address, int length, bool external);
void instruction_done(struct cpu *cpu, uint64_t rip);
uint64_t linear_rip(const struct cpu *cpu);

/* pass.c */
/* A pass that an SVM exit ends has VMEXIT + its number as exception: AMD APM vol. 2, appendix C. */
enum { VMEXIT = 0x100, EXIT_WRITE_DR5 = 0x35, EXIT_WRITE_DR7 = 0x37, EXIT_INIT = 0x63, EXIT_MSR = 0x7c };
enum { DR_WRITES = 1 << 5 | 1 << 7 }; /* the registers whose writes are intercepted */
enum { REQUEST_VIRQ = 0x100, REQUEST_NMI = 0x200, REQUEST_INIT = 0x400 }; /* CPUState.interrupt_request */
bool pass_open(struct cpu *cpu);
int emulate(struct cpu *cpu);
void end_pass(struct cpu *cpu, enum cause cause);
void sealed_pass(struct cpu *cpu);
void set_interrupt_request(struct cpu *cpu, uint32_t set, uint32_t clear);

/* state.c */
void load_state(struct cpu *cpu);
void store_state(struct cpu *cpu);
void update_hflags(struct cpu *cpu);
void store_msrs(struct cpu *cpu);
void load_msrs(struct cpu *cpu);
void forget_instruction(struct cpu *cpu);
/* fpu.c */
void load_fpu(struct cpu *cpu);
void store_fpu(struct cpu *cpu);

/* space.c */
struct leaf space_find(struct cpu_space *space, uint64_t gfn, unsigned access);
void space_add(struct cpu_space *space, struct cpu *cpu);
void space_remove(struct cpu_space *space, struct cpu *cpu);
uint64_t space_generation(struct cpu_space *space);
struct code_index *space_code(struct cpu_space *space);
/* Calls `act` for each CPU of the space whose bit is in `mask`; CPUs neither come nor go meanwhile. */
void space_each(struct cpu_space *space, uint64_t mask, void (*act)(struct cpu *, void *), void *data);
_Atomic(struct cpu *) *space_exclusive(struct cpu_space *space);

/* walk.c */
void current_paging(const struct cpu *cpu, struct paging *paging);
void implicit_paging(struct paging *paging);
bool walk(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access_kind kind, struct guest_page *page);

/* tlb.c */
bool on_fill(uc_engine *uc, uint64_t linear, uc_mem_type kind, uc_tlb_entry *entry, void *data);
void tlb_flush(struct cpu *cpu);
void tlb_slice_over(struct cpu *cpu);

/* linear.c */
bool read_linear(struct cpu *cpu, uint64_t linear, void *data, unsigned size);
bool write_linear(struct cpu *cpu, uint64_t linear, const void *data, unsigned size);
bool read_code(struct cpu *cpu, uint64_t linear, void *data, unsigned size);
bool walk_as_guest(struct cpu *cpu, uint64_t linear, enum access_kind kind, struct guest_page *page);

/* code.c, code_index.c, code_messages.c */
struct code_map *code_map_create(void);
void code_map_destroy(struct code_map *map);
void code_fetched(struct cpu *cpu, uint64_t linear, uint64_t hva);
bool code_write_granted(struct cpu *cpu, uint64_t linear, uint64_t hva, bool executable);
void code_written(struct cpu *cpu, uint64_t hva, unsigned size);
void code_check_live(struct cpu *cpu);
void code_run_ended(struct cpu *cpu);
void code_drop_page(struct cpu *cpu, uint64_t hva);
void code_drop_grant(struct cpu *cpu, uint64_t hva);
void code_recheck(struct cpu *cpu, uint64_t hva);
void code_drop_all(struct cpu *cpu);
struct code_index *code_index_create(void);
void code_index_destroy(struct code_index *index);
uint64_t code_executors(struct code_index *index, uint64_t hva);
void code_add_executor(struct code_index *index, uint64_t hva, uint64_t bit);
uint64_t code_keep_executors(struct code_index *index, uint64_t hva, uint64_t keep);
void code_ask(struct cpu *cpu, uint64_t others, uint64_t hva, enum code_request request, bool wait);
void code_take_messages(struct cpu *cpu, uint64_t but);

/* delivery.c, exceptions.c */
enum delivered { DELIVERED, DELIVERY_FAULT, DELIVERY_REFUSED, DELIVERY_UNSUPPORTED };
enum delivered deliver_once(struct cpu *cpu, const struct event *event, uint64_t rip, struct event *second);
int deliver_pending(struct cpu *cpu);
bool has_error_code(int vector);
bool is_fault(int vector);

/* instructions.c, guest_calls.c, msrs.c */
bool add_instruction_hooks(struct cpu *cpu);
void enter_kernel(struct cpu *cpu, enum cause cause);
int access_msr(struct cpu *cpu);
int int_length(struct cpu *cpu, int vector);
int guest_call(struct cpu *cpu); /* the stop for the call at RIP; 0 with #UD or what it raises pending */
void complete_call(struct cpu *cpu, const struct question *asked, uint64_t value);
uint64_t tsc_now(const struct cpu_block *block);
bool msr_read(const struct cpu_block *block, uint32_t index, uint64_t *value);
bool msr_write(struct cpu_block *block, uint32_t index, uint64_t value, bool guest);
void msrs_reset(struct cpu_block *block);
uint64_t *msr_slot(struct cpu_block *block, uint32_t index);
void cpuid_lookup(const struct cpu_block *block, uint32_t leaf, uint32_t subleaf, uint32_t answer[4]);
unsigned physical_bits(const struct cpu_block *block);

/* port_io.c */
bool add_port_hooks(struct cpu *cpu);
int port_stop(struct cpu *cpu);
int port_answer(struct cpu *cpu, const uint8_t *data);
void port_roll_back(struct cpu *cpu);
bool port_supplied(const struct cpu *cpu);

/* mmio.c */
bool mmio_covers(const struct cpu *cpu, uint64_t gpa);
bool mmio_active(const struct cpu *cpu);
int mmio_add_page(struct cpu *cpu, uint64_t gpa);
int advance_mmio(struct cpu *cpu);
void mmio_supply(struct cpu *cpu, uint64_t value);
int mmio_next_write(struct cpu *cpu);
void mmio_release(struct cpu *cpu);
void mmio_forget(struct cpu *cpu);

/* interrupts.c */
int poll_interrupts(struct cpu *cpu, bool *taken);
bool interrupts_open(const struct cpu *cpu);
bool must_step(const struct cpu *cpu);

/* watch.c */
int step_watched(struct cpu *cpu); /* as step() */

/* fault.c */
enum { EXIT_WATCH = 0x1fc, EXIT_ATOMIC = 0x1fd, EXIT_FAULT = 0x1fe }; /* numbers of exceptions that no CPU has */
int after_fault(struct cpu *cpu);

/* exclusive.c, slices.c */
bool enter_guest(struct cpu *cpu);
void leave_guest(struct cpu *cpu);
bool yield_guest(struct cpu *cpu);
void engine_reset(void);
bool begin_exclusive(struct cpu *cpu);
void end_exclusive(struct cpu *cpu);
void kick(struct cpu *cpu, uint32_t why);
int take_kicks(struct cpu *cpu);
void look_at_space(struct cpu *cpu);
void slice_begins(struct cpu *cpu, bool goes_on);
void slice_ends(struct cpu *cpu);
void slices_add(struct cpu *cpu);
void slices_remove(struct cpu *cpu);

static inline uint64_t minimum(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline bool long_mode(const struct cpu *cpu)
{
    return cpu->env->efer & EFER_LMA;
}
