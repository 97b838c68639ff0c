/* Unicorn's CPU as it lies in memory: the structures of QEMU (target/i386/cpu.h, include/hw/core/cpu.h) that are read and
 * patched where they are, since the register API costs a call for each register and does not reach the hidden part of
 * segments, the mode, the exception in flight, nor why a pass has ended. For Unicorn 2.1.4; layout.c checks them. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct segment_cache {
    uint32_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags; /* the second word of a descriptor */
};

/* The first fields of CPUX86State. Between two passes `eflags` is all of RFLAGS. */
struct env {
    uint64_t regs[16]; /* RAX RCX RDX RBX RSP RBP RSI RDI R8 .. */
    uint64_t eip;
    uint64_t eflags;
    uint64_t cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t df;
    uint32_t hflags, hflags2;
    struct segment_cache segs[6]; /* ES CS SS DS FS GS */
    struct segment_cache ldt, tr, gdt, idt;
    uint64_t cr[9];
    int32_t a20_mask;
    uint64_t bnd_regs[8], bndcs_regs[2], msr_bndcfgs;
    uint64_t efer;
};

/* From SYSENTER_CS to XCR0. */
struct env_msrs {
    uint32_t sysenter_cs;
    uint64_t sysenter_esp, sysenter_eip, star, vm_hsave, lstar, cstar, fmask, kernel_gs_base;
    uint64_t tsc, tsc_adjust, tsc_deadline, tsc_aux, xcr0;
};

/* From the last exception on. */
struct env_tail {
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

/* CPUState from `halted` on: how the last pass has ended. */
struct pass_end {
    uint32_t halted, can_do_io;
    int32_t exception_index;
};

/* `interrupt_request` is looked at between two blocks, if the first does not jump to the second by itself; 0xffff in
 * `leave_blocks` makes each block return. */
struct unicorn_state {
    uint8_t *object; /* X86CPU */
    struct env *env;
    struct env_msrs *msrs;
    struct env_tail *tail;
    struct pass_end *pass_end;
    uint32_t *interrupt_request;
    uint16_t *leave_blocks;
    uint8_t *no_exit_request;
    uint64_t *fault_address;
    uint8_t *tcg;
};

enum { ENV_SIZE = 5568 }; /* what a snapshot of the registers has */

bool unicorn_state_find(void *uc, struct unicorn_state *at, const char **why);
