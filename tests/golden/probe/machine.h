/* A one-vCPU machine for section G, and what its KVM_RUN answers. */
#ifndef GOLDEN_MACHINE_H
#define GOLDEN_MACHINE_H

#include "probe.h"

#define DATA_GPA 0x10000ul
#define DATA_SLOT 1u

struct machine {
    int vm, vcpu;
    struct kvm_run *run;
};

/* A VM whose vCPU is about to run the guest program of machine.c, which lies in a plain slot of its own. */
struct machine new_machine(void);
/* From the first instruction again; an exit that waits for its completion is completed first. */
void restart(const struct machine *machine);
/* KVM_RUN until the next exit, told as the table does. */
const char *next_exit(const struct machine *machine);

/* The file's (or, with fd -1, a plain) slot at DATA_GPA, one page. */
void bind_data(const struct machine *machine, int fd, const void *hva);
void delete_data(const struct machine *machine);

#endif
