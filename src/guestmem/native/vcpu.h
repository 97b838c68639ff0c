/* vCPUs that run here: in the thread that calls KVM_RUN, on this process's memory, by the library of ../cpu/native. */
#pragma once

#include <pthread.h>

#include "../cpu/native/cpu.h"
#include "shim.h"

/* ---- library.c: the CPU, loaded when a vCPU first runs, where its symbols meet nobody else's */

struct library {
    __typeof__(&cpu_space_create) space_create;
    __typeof__(&cpu_space_destroy) space_destroy;
    __typeof__(&cpu_space_map) space_map;
    __typeof__(&cpu_space_map_mmio) space_map_mmio;
    __typeof__(&cpu_space_drop) space_drop;
    __typeof__(&cpu_create) create;
    __typeof__(&cpu_destroy) destroy;
    __typeof__(&cpu_last_error) last_error;
    __typeof__(&cpu_run) run;
    __typeof__(&cpu_settle) settle;
    __typeof__(&cpu_kick) kick;
    __typeof__(&cpu_takes_interrupts) takes_interrupts;
    __typeof__(&cpu_set_mode) set_mode;
    __typeof__(&cpu_watch_signals) watch_signals;
    __typeof__(&cpu_handle_fault) handle_fault;
};

extern struct library library;

bool library_load(const char *path, enum cpu_mode mode);

/* ---- spaces.c: stage 2 of each VM in this process, as the server has it */

struct space {
    uint64_t vm; /* the server's number */
    struct cpu_space *leaves;
    uint64_t generation; /* of the last drop; leaves of a generation before it are stale. By `lock` */
    pthread_mutex_t lock;
    struct space *next;
};

/* A leaf as the server sends it; UP_ENTER has a list of them. */
enum { LEAF_WRITABLE = 1, LEAF_MMIO = 2 };

struct leaf {
    uint64_t gfn, count, hva;
    uint32_t kinds, flags;
};

struct enter {
    uint64_t vcpu, generation;
    uint64_t leaves; /* that many follow */
};

/* UP_DROP: frames that have no leaf any more, then ranges of aliases whose pages are to be unmapped. */
struct drop {
    uint64_t vm, generation;
    uint32_t frames, zaps;
};

struct frames {
    uint64_t gfn, count;
    uint32_t kinds, reserved;
};

struct space *space_of(uint64_t vm); /* makes it; NULL: no memory */
int space_install(struct space *space, uint64_t generation, const struct leaf *leaves, size_t count);
int space_drop(const unsigned char *payload, size_t length);
int alias_map(int fd, uint64_t offset, uint64_t size, uint64_t *address);
void space_forget(uint64_t vm); /* the VM is no more, and nobody runs its vCPUs */
void spaces_lock(void);
void spaces_unlock(void);
void spaces_after_fork(void);

/* ---- vcpus.c */

/* The first page of what the server shares of a vCPU; the block of the CPU is behind it. */
struct vcpu_page {
    uint32_t direct;        /* the server's leave to run, and to come back with what DIRECT says, without asking it */
    uint32_t reserved;
    uint64_t direct_exits; /* how often that was so */
};

struct vcpu {
    uint64_t file; /* the descriptor's */
    struct space *space;
    struct vcpu_page *page;
    struct cpu_block *block;
    struct kvm_run *run;
    struct cpu *cpu;
    uint32_t owner;     /* the thread that has it, as a kernel's vcpu->mutex; 0 nobody. A futex */
    bool asked;         /* the last exit was ours, and its answer is in `run` */
    pthread_t runner;   /* the thread that is in the guest, while `in_guest` */
    bool in_guest;
    bool called_back;   /* the server wants it to come back */
    struct vcpu *next;
};

struct vcpu *vcpu_of(uint64_t file, int *error); /* made when first asked for */
struct vcpu *vcpu_known(uint64_t file);
long vcpu_run(const struct file *file, uintptr_t argument);
long vcpu_get_regs(const struct file *file, void *regs);  /* 1: the server must */
void vcpu_lock(struct vcpu *vcpu);
void vcpu_unlock(struct vcpu *vcpu);
int vcpu_enter(const unsigned char *payload, size_t length, uint64_t *kind); /* UP_ENTER */
void vcpu_kick(uint64_t file);                                               /* UP_KICK */
void vcpus_look(pthread_t thread); /* it has been sent a signal */
void vcpus_look_all(void);
void vcpus_forget(uint64_t vm);
void vcpus_after_fork(void);

/* ---- exits.c: struct kvm_run */

void exit_take_answer(struct vcpu *vcpu);
/* Whether the stop is an exit that needs nobody else; it is written then. */
bool exit_write(struct vcpu *vcpu, int kind);
void exit_write_interrupted(struct vcpu *vcpu);

/* ---- faults.c: SIGSEGV and SIGBUS, which the guest's accesses raise and the client may have handlers for */

void faults_begin(void); /* of a run: whoever has changed the handlers since, they are below ours again */
void faults_end(void);
void faults_after_fork(void);
