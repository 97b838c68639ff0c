/* Unicorn 2.1.4 as it lies in memory: what its C interface does not reach, or reaches too slowly for every stop.
 *
 * Names are those of Unicorn's source (qemu/target/i386/cpu.h, qemu/include/hw/core/cpu.h, qemu/include/tcg/tcg.h).
 * layout_check() compares all of it with what marked values and a few instructions show before the first CPU is made. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <unicorn/unicorn.h>

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
enum { ES, CS, SS, DS, FS, GS };

/* A segment register with its hidden part; `flags` is the second word of a descriptor. */
struct segment_cache {
    uint32_t selector;
    uint64_t base;
    uint32_t limit, flags;
};

union fp_register {
    struct {
        uint64_t significand;
        uint16_t exponent;
    };
    uint8_t bytes[16];
} __attribute__((aligned(16)));

/* The first fields of CPUX86State. Between two passes `eflags` is all of RFLAGS. */
struct uc_env {
    uint64_t regs[16];
    uint64_t eip, eflags;
    uint64_t cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t df;
    uint32_t hflags, hflags2;
    struct segment_cache segs[6];
    struct segment_cache ldt, tr, gdt, idt;
    uint64_t cr[9];
    int32_t a20_mask;
    uint64_t bnd_regs[8], bndcs_regs[2];
    uint64_t msr_bndcfgs;
    uint64_t efer;
    uint32_t start_init_save, fpstt;
    uint16_t fpus, fpuc;
    uint8_t fptags[8]; /* 1: empty */
    union fp_register fpregs[8];
    uint16_t fpop, fpcs, fpds;
    uint64_t fpip, fpdp;
    uint8_t float_status[40];
    uint32_t mxcsr, padding;
    struct {
        uint8_t low[16], rest[48];
    } xmm_regs[16];
};

/* The fields of CPUX86State from SYSENTER_CS to XCR0. */
struct uc_msrs {
    uint32_t sysenter_cs;
    uint64_t sysenter_esp, sysenter_eip, star, vm_hsave, lstar, cstar, fmask, kernel_gs_base;
    uint64_t tsc, tsc_adjust, tsc_deadline, tsc_aux, xcr0;
};

/* The fields of CPUX86State from the last exception on. */
struct uc_tail {
    int32_t error_code, exception_is_int;
    uint64_t exception_next_eip;
    uint64_t dr[8];
    uint64_t breakpoints[4];
    int32_t old_exception;
    uint64_t vm_vmcb, tsc_offset, intercept;
    uint16_t intercept_cr_read, intercept_cr_write, intercept_dr_read, intercept_dr_write;
    uint32_t intercept_exceptions;
    uint64_t nested_cr3;
    uint32_t nested_pg_mode;
    uint8_t v_tpr;
};

/* The fields of CPUState from `halted` on: how the last pass has ended. */
struct uc_pass_end {
    uint32_t halted, can_do_io;
    int32_t exception_index;
};

/* Offsets in the handle (uc_struct), in X86CPU, in CPUX86State, in TCGContext and in TranslationBlock. */
enum {
    UC_CPU = 440,
    UC_TCG = 768,
    UC_INVALID_ADDR = 1416,
    UC_NO_EXIT_REQUEST = 2034,
    CPU_INTERRUPT_REQUEST = 28,
    CPU_ICOUNT_DECR_PTR = 304,
    CPU_PASS_END = 33176,
    CPU_ENV = 35408,
    ENV_MSRS = 4800,
    ENV_TAIL = 5384,
    ENV_SIZE = 5568,
    TCG_TB_CFLAGS = 100,
    TCG_CODE_BUFFER = 160,
    TCG_CODE_BUFFER_SIZE = 184,
    TB_FLAGS = 16,
    TB_CFLAGS = 24,
};

_Static_assert(offsetof(struct uc_env, cr) == 424, "CPUX86State.cr");
_Static_assert(offsetof(struct uc_env, efer) == 592, "CPUX86State.efer");
_Static_assert(offsetof(struct uc_env, fpregs) == 624, "CPUX86State.fpregs");
_Static_assert(offsetof(struct uc_env, mxcsr) == 816, "CPUX86State.mxcsr");
_Static_assert(offsetof(struct uc_env, xmm_regs) == 824, "CPUX86State.xmm_regs");
_Static_assert(offsetof(struct uc_tail, v_tpr) == 172, "CPUX86State.v_tpr");

/* The live structures of one CPU. */
struct uc_view {
    uint8_t *cpu_state, *tcg;
    struct uc_env *env;
    struct uc_msrs *msrs;
    struct uc_tail *tail;
    struct uc_pass_end *pass_end;
    uint32_t *interrupt_request; /* looked at between two blocks, if the first does not jump to the second by itself */
    uint16_t *leave_blocks;      /* 0xffff makes each block return */
    uint8_t *no_exit_request;
    uint64_t *fault_address;
};

uc_engine *layout_open(void);
void layout_view(uc_engine *uc, struct uc_view *view);
/* Whether this Unicorn is the one that is described here; if not, says so by set_error(). */
bool layout_check(void);
/* Where the translator keeps the flags of the block that it translates, in its context. */
extern unsigned layout_disas_flags;
