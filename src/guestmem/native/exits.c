/* struct kvm_run, for the exits that need nobody but the CPU and its VMM. All others are the server's to write. */
#define _GNU_SOURCE
#include <string.h>

#include "vcpu.h"

enum { IO_DATA = 4096, MMIO_MOST = 8 };

#define RFLAGS_IF (1ULL << 9)

/* Source: post_kvm_run_save */
static void write_state(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    run->if_flag = vcpu->block->regs.rflags & RFLAGS_IF ? 1 : 0;
    run->ready_for_interrupt_injection = library.takes_interrupts(vcpu->block);
    run->cr8 = vcpu->block->sregs.cr8;
    run->apic_base = vcpu->block->sregs.apic_base;
}

void exit_take_answer(struct vcpu *vcpu)
{
    const struct cpu_stop *stop = &vcpu->block->stop;
    struct cpu_answer *answer = &vcpu->block->answer;
    vcpu->asked = false;
    answer->kind = CPU_ANSWER_VALUE;
    if (stop->kind == CPU_STOP_PORT_IN)
        memcpy(answer->data, (const char *)vcpu->run + IO_DATA, (size_t)stop->size * stop->count);
    else
        memcpy(answer->data, vcpu->run->mmio.data, stop->size);
}

static void write_io(struct kvm_run *run, const struct cpu_stop *stop, bool out)
{
    run->exit_reason = KVM_EXIT_IO;
    run->io.direction = out ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
    run->io.size = (uint8_t)stop->size;
    run->io.port = stop->port;
    run->io.count = stop->count;
    run->io.data_offset = IO_DATA;
    if (out)
        memcpy((char *)run + IO_DATA, stop->data, (size_t)stop->size * stop->count);
}

static void write_mmio(struct kvm_run *run, const struct cpu_stop *stop, bool write)
{
    run->exit_reason = KVM_EXIT_MMIO;
    run->mmio.phys_addr = stop->gpa;
    run->mmio.len = stop->size;
    run->mmio.is_write = write;
    memset(run->mmio.data, 0, MMIO_MOST);
    if (write)
        memcpy(run->mmio.data, stop->data, stop->size);
}

bool exit_write(struct vcpu *vcpu, int kind)
{
    struct kvm_run *run = vcpu->run;
    const struct cpu_stop *stop = &vcpu->block->stop;
    if ((size_t)stop->size * stop->count > CPU_STOP_DATA)
        return false;
    switch (kind) {
    case CPU_STOP_PORT_OUT:
    case CPU_STOP_PORT_IN:
        write_io(run, stop, kind == CPU_STOP_PORT_OUT);
        vcpu->asked = kind == CPU_STOP_PORT_IN;
        break;
    case CPU_STOP_MMIO_READ:
    case CPU_STOP_MMIO_WRITE:
        write_mmio(run, stop, kind == CPU_STOP_MMIO_WRITE);
        vcpu->asked = kind == CPU_STOP_MMIO_READ;
        break;
    case CPU_STOP_HALT:
        run->exit_reason = KVM_EXIT_HLT;
        break;
    case CPU_STOP_WINDOW:
        run->exit_reason = KVM_EXIT_IRQ_WINDOW_OPEN;
        break;
    default:
        return false;
    }
    write_state(vcpu);
    return true;
}

void exit_write_interrupted(struct vcpu *vcpu)
{
    vcpu->run->exit_reason = KVM_EXIT_INTR;
    write_state(vcpu);
}
