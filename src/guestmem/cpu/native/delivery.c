/* Exceptions, interrupts and INT instructions, delivered as the CPU does it: gate, stack, frame, handler. Unicorn raises an
 * exception and leaves the rest to its user. A fault on the way becomes the second exception of the table of double faults; a
 * fault after that is a triple fault. Nothing of the registers changes before the last memory access is done, so a delivery
 * that stage 2 interrupts is repeated as a whole.
 *
 * Source: Intel SDM vol. 3, chapter 7 "Interrupt and exception handling" (double faults: tables 7-4 and 7-5), and vol. 2,
 * "INT n"; AMD APM vol. 2, 15.35.5 for #VC, which makes no double fault here. Not modelled: task gates and virtual-8086 mode
 * (the stop says so), shadow stacks, segment limits of stacks. */
#include <stdio.h>

#include "inside.h"

enum { INTERRUPT_16 = 6, TRAP_16 = 7, INTERRUPT_32 = 14, TRAP_32 = 15, TASK = 5 };
enum outcome { ENTERED, FAULTED, INTERRUPTED, UNSUPPORTED };

bool has_error_code(uint8_t vector)
{
    return vector == DF || (vector >= TS && vector <= PF) || vector == 17 || vector == 21 || vector == VC;
}

static bool is_contributory(uint8_t vector)
{
    return vector == 0 || (vector >= TS && vector <= GP);
}

static bool is_fault(uint8_t vector)
{
    switch (vector) {
    case 0: case 5: case UD: case NM: case TS: case NP: case SS_FAULT: case GP: case PF: case 16: case 17: case 19: case VC:
        return true;
    default:
        return false;
    }
}

/* A delivery under way. */
struct delivery {
    struct cpu *cpu;
    const struct event *event;
    uint64_t rip;     /* that the frame has */
    bool long_mode;
    uint8_t cpl, ext; /* EXT of error codes: 1 unless a program asked for it */
    /* the fault that ended it */
    uint8_t vector;
    uint32_t error_code;
    uint64_t address;
    const char *unsupported; /* what is not modelled */
    /* the gate */
    uint32_t selector, size; /* of a word of the frame */
    uint64_t offset;
    bool interrupt;
    unsigned ist;
    /* code and stack to come */
    struct segment_cache code, stack;
    bool new_stack;
    uint64_t pointer, base, mask;
    unsigned level;
};

static enum outcome fault(struct delivery *d, uint8_t vector, uint32_t error_code)
{
    d->vector = vector;
    d->error_code = error_code;
    return FAULTED;
}

/* linear_read() or linear_write() was refused. */
static enum outcome refused(struct delivery *d)
{
    const struct refused *why = &d->cpu->refused;
    if (why->why != REFUSED_GUEST)
        return INTERRUPTED;
    d->address = why->address;
    return fault(d, why->vector, why->error_code);
}

static enum outcome read_word(struct delivery *d, uint64_t linear, uint32_t size, uint64_t *value)
{
    *value = 0;
    return linear_read(d->cpu, linear, value, size) ? ENTERED : refused(d);
}

/* ---- real mode: through the vector table, IP and CS, no error code */

static enum outcome deliver_real(struct delivery *d)
{
    struct env *env = d->cpu->at.env;
    uint64_t entry, pointer = env->regs[RSP];
    uint16_t words[3] = {(uint16_t)env->eflags, (uint16_t)env->segs[CS].selector, (uint16_t)d->rip};
    if (d->event->vector * 4u + 3 > env->idt.limit)
        return fault(d, GP, d->event->vector * 8u + 2);
    enum outcome outcome = read_word(d, env->idt.base + d->event->vector * 4u, 4, &entry);
    for (int i = 0; i < 3 && outcome == ENTERED; i++) {
        pointer = (pointer & ~0xffffULL) | ((pointer - 2) & 0xffff);
        if (!linear_write(d->cpu, env->segs[SS].base + (pointer & 0xffff), &words[i], 2))
            outcome = refused(d);
    }
    if (outcome != ENTERED)
        return outcome;
    env->regs[RSP] = pointer;
    env->eip = entry & 0xffff;
    env->eflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_RF | RFLAGS_AC);
    env->segs[CS].selector = (uint32_t)(entry >> 16);
    env->segs[CS].base = entry >> 16 << 4;
    return ENTERED;
}

/* ---- the gate */

static bool is_gate(const struct delivery *d, unsigned kind)
{
    if (kind == INTERRUPT_32 || kind == TRAP_32)
        return true;
    return !d->long_mode && (kind == INTERRUPT_16 || kind == TRAP_16);
}

static enum outcome find_gate(struct delivery *d)
{
    const struct env *env = d->cpu->at.env;
    uint32_t size = d->long_mode ? 16 : 8, vector = d->event->vector, error_code = vector * 8 + 2 + d->ext;
    uint64_t low, high = 0, at = env->idt.base + (uint64_t)vector * size;
    if (vector * size + size - 1 > env->idt.limit)
        return fault(d, GP, error_code);
    enum outcome outcome = read_word(d, at, 8, &low);
    if (outcome != ENTERED)
        return outcome;
    unsigned kind = low >> 40 & 31;
    if (kind == TASK && !d->long_mode) {
        d->unsupported = "through a task gate";
        return UNSUPPORTED;
    }
    if (!is_gate(d, kind))
        return fault(d, GP, error_code);
    if (d->event->length && (low >> 45 & 3) < d->cpl)
        return fault(d, GP, error_code);
    if (!(low >> 47 & 1))
        return fault(d, NP, error_code);
    if (d->long_mode && (outcome = read_word(d, at + 8, 4, &high)) != ENTERED)
        return outcome;
    d->selector = low >> 16 & 0xffff;
    d->offset = (low & 0xffff) | (kind >= INTERRUPT_32 ? low >> 32 & 0xffff0000 : 0) | high << 32;
    d->interrupt = kind == INTERRUPT_16 || kind == INTERRUPT_32;
    d->size = d->long_mode ? 8 : kind >= INTERRUPT_32 ? 4 : 2;
    d->ist = d->long_mode ? low >> 32 & 7 : 0;
    return ENTERED;
}

/* ---- segments */

void segment_load(struct segment_cache *segment, uint32_t selector, uint64_t descriptor)
{
    uint32_t limit = (uint32_t)((descriptor & 0xffff) | (descriptor >> 32 & 0xf0000));
    segment->selector = selector;
    segment->base = (descriptor >> 16 & 0xffffff) | (descriptor >> 32 & 0xff000000);
    segment->limit = descriptor >> 55 & 1 ? limit << 12 | 0xfff : limit;
    segment->flags = descriptor >> 32 & 0x00f0ff00;
}

static unsigned type_of(const struct segment_cache *segment)
{
    return segment->flags >> 8 & 15;
}

static unsigned dpl_of(const struct segment_cache *segment)
{
    return segment->flags >> 13 & 3;
}

/* `vector` is the exception if its table does not reach that far. */
static enum outcome read_segment(struct delivery *d, uint32_t selector, uint8_t vector, struct segment_cache *segment)
{
    const struct env *env = d->cpu->at.env;
    bool local = selector & 4, no_table = local && !(env->ldt.flags & DESC_P);
    const struct segment_cache *table = local ? &env->ldt : &env->gdt;
    uint64_t descriptor;
    if (no_table || (selector & ~7u) + 7 > table->limit)
        return fault(d, vector, (selector & ~3u) | d->ext);
    enum outcome outcome = read_word(d, table->base + (selector & ~7u), 8, &descriptor);
    if (outcome == ENTERED)
        segment_load(segment, selector, descriptor);
    return outcome;
}

enum { DESC_S = 1 << 12, CONFORMING = 4, CODE_SEGMENT = 8, WRITABLE_DATA = 2 };

/* The handler's code. */
static enum outcome find_code(struct delivery *d)
{
    uint32_t error_code = (d->selector & ~3u) | d->ext;
    if (!(d->selector & ~3u))
        return fault(d, GP, d->ext);
    enum outcome outcome = read_segment(d, d->selector, GP, &d->code);
    if (outcome != ENTERED)
        return outcome;
    if (!(d->code.flags & DESC_S) || !(type_of(&d->code) & CODE_SEGMENT) || dpl_of(&d->code) > d->cpl)
        return fault(d, GP, error_code);
    if (d->long_mode && (!(d->code.flags & DESC_L) || d->code.flags & DESC_B))
        return fault(d, GP, error_code);
    if (!(d->code.flags & DESC_P))
        return fault(d, NP, error_code);
    d->level = type_of(&d->code) & CONFORMING ? d->cpl : dpl_of(&d->code);
    return ENTERED;
}

/* ---- the stack */

static enum outcome read_tss(struct delivery *d, uint32_t offset, uint32_t size, uint64_t *value)
{
    const struct segment_cache *tr = &d->cpu->at.env->tr;
    if (offset + size - 1 > tr->limit)
        return fault(d, TS, (tr->selector & ~3u) | d->ext);
    return read_word(d, tr->base + offset, size, value);
}

/* RSP from the IST, from the TSS if the level changes, or as it is; SS becomes null if the level changes. */
static enum outcome find_long_stack(struct delivery *d)
{
    enum outcome outcome = ENTERED;
    d->pointer = d->cpu->at.env->regs[RSP];
    if (d->ist)
        outcome = read_tss(d, 36 + (d->ist - 1) * 8, 8, &d->pointer);
    else if (d->level < d->cpl)
        outcome = read_tss(d, 4 + d->level * 8, 8, &d->pointer);
    d->new_stack = d->level < d->cpl;
    d->stack = (struct segment_cache){.selector = d->level, .flags = d->level << 13};
    d->pointer &= ~15ULL;
    d->base = 0;
    d->mask = ~0ULL;
    return outcome;
}

static void use_stack(struct delivery *d, const struct segment_cache *segment)
{
    d->base = segment->base;
    d->mask = segment->flags & DESC_B ? 0xffffffff : 0xffff;
}

/* Without long mode SS and ESP of the inner level are both in the TSS. */
static enum outcome find_inner_stack(struct delivery *d)
{
    bool wide = type_of(&d->cpu->at.env->tr) & 8;
    uint64_t selector;
    enum outcome outcome = read_tss(d, wide ? 4 + d->level * 8 : 2 + d->level * 4, wide ? 4 : 2, &d->pointer);
    if (outcome == ENTERED)
        outcome = read_tss(d, wide ? 8 + d->level * 8 : 4 + d->level * 4, 2, &selector);
    if (outcome != ENTERED)
        return outcome;
    uint32_t error_code = ((uint32_t)selector & ~3u) | d->ext;
    if (!(selector & ~3ULL) || (selector & 3) != d->level)
        return fault(d, TS, error_code);
    outcome = read_segment(d, (uint32_t)selector, TS, &d->stack);
    if (outcome != ENTERED)
        return outcome;
    bool is_data = d->stack.flags & DESC_S && (type_of(&d->stack) & (CODE_SEGMENT | WRITABLE_DATA)) == WRITABLE_DATA;
    if (!is_data || dpl_of(&d->stack) != d->level)
        return fault(d, TS, error_code);
    if (!(d->stack.flags & DESC_P))
        return fault(d, SS_FAULT, error_code);
    d->new_stack = true;
    use_stack(d, &d->stack);
    return ENTERED;
}

static enum outcome find_stack(struct delivery *d)
{
    const struct env *env = d->cpu->at.env;
    if (d->long_mode)
        return find_long_stack(d);
    if (d->level != d->cpl)
        return find_inner_stack(d);
    d->pointer = env->regs[RSP];
    use_stack(d, &env->segs[SS]);
    return ENTERED;
}

/* ---- the frame */

static enum outcome push(struct delivery *d, uint64_t word)
{
    d->pointer = (d->pointer & ~d->mask) | ((d->pointer - d->size) & d->mask);
    if (linear_write(d->cpu, d->base + (d->pointer & d->mask), &word, d->size))
        return ENTERED;
    enum outcome outcome = refused(d);
    return outcome == FAULTED && d->vector == GP ? fault(d, SS_FAULT, d->ext) : outcome;
}

static enum outcome push_frame(struct delivery *d)
{
    const struct env *env = d->cpu->at.env;
    bool exception = event_is_exception(d->event);
    uint64_t words[6];
    int count = 0;
    if (d->long_mode || d->new_stack) {
        words[count++] = env->segs[SS].selector;
        words[count++] = env->regs[RSP];
    }
    words[count++] = env->eflags | (exception && is_fault(d->event->vector) ? RFLAGS_RF : 0);
    words[count++] = env->segs[CS].selector;
    words[count++] = d->rip;
    if (exception && has_error_code(d->event->vector))
        words[count++] = d->event->error_code;
    for (int i = 0; i < count; i++) {
        enum outcome outcome = push(d, words[i]);
        if (outcome != ENTERED)
            return outcome;
    }
    return ENTERED;
}

/* ---- the first instruction of the handler is next */

static void enter(struct delivery *d)
{
    struct env *env = d->cpu->at.env;
    if (d->new_stack)
        env->segs[SS] = d->stack;
    env->segs[CS] = d->code;
    env->segs[CS].selector = (d->selector & ~3u) | d->level;
    env->regs[RSP] = d->pointer;
    env->eip = d->offset;
    env->eflags &= ~(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM | (d->interrupt ? RFLAGS_IF : 0));
}

static enum outcome deliver_protected(struct delivery *d)
{
    enum outcome outcome = find_gate(d);
    if (outcome == ENTERED)
        outcome = find_code(d);
    if (outcome == ENTERED)
        outcome = find_stack(d);
    if (outcome == ENTERED)
        outcome = push_frame(d);
    if (outcome == ENTERED)
        enter(d);
    return outcome;
}

static enum outcome deliver_once(struct delivery *d)
{
    const struct env *env = d->cpu->at.env;
    d->long_mode = env->efer & EFER_LMA;
    d->cpl = dpl_of(&env->segs[SS]);
    d->ext = d->event->length ? 0 : 1;
    if (env->eflags & RFLAGS_VM) {
        d->unsupported = "in virtual-8086 mode";
        return UNSUPPORTED;
    }
    return env->cr[0] & CR0_PE ? deliver_protected(d) : deliver_real(d);
}

/* ---- and what faults on the way */

static bool makes_double_fault(const struct event *first, uint8_t second)
{
    if (!event_is_exception(first))
        return false;
    if (first->vector == PF)
        return is_contributory(second) || second == PF;
    return is_contributory(first->vector) && is_contributory(second);
}

static int entered(struct cpu *cpu)
{
    cpu->pending.present = false;
    mmio_forget(cpu);
    update_hflags(cpu);
    return CPU_STOP_NONE;
}

static int triple_fault(struct cpu *cpu)
{
    cpu->pending.present = false;
    stop_begin(cpu, CPU_STOP_SHUTDOWN);
    return CPU_STOP_SHUTDOWN;
}

static int unsupported(struct cpu *cpu, const struct delivery *d)
{
    char why[sizeof(cpu->block->stop.why)];
    snprintf(why, sizeof(why), "vector %d %s", d->event->vector, d->unsupported);
    return stop_failed(cpu, why);
}

/* #BP and #OF that who steers injects are for the INT3 or INTO at RIP, and their frames have the next instruction. Source:
 * arch/x86/kvm/vmx/vmx.c vmx_inject_exception(), kvm_exception_is_soft(). */
static unsigned injected_length(const struct event *event)
{
    return event_is_exception(event) && (event->vector == BP || event->vector == OF);
}

int deliver(struct cpu *cpu)
{
    struct event event = cpu->pending;
    uint64_t rip = cpu->at.env->eip;
    for (;;) {
        struct delivery d = {.cpu = cpu, .event = &event, .rip = rip + injected_length(&event)};
        if (event.vector == PF && event_is_exception(&event))
            cpu->at.env->cr[2] = event.address;
        switch (deliver_once(&d)) {
        case ENTERED:
            return entered(cpu);
        case INTERRUPTED:
            return stop_not_done(cpu, &cpu->refused);
        case UNSUPPORTED:
            return unsupported(cpu, &d);
        case FAULTED:
            break;
        }
        if (event.vector == DF && (is_contributory(d.vector) || d.vector == PF))
            return triple_fault(cpu);
        if (d.vector == PF)
            cpu->at.env->cr[2] = d.address;
        rip -= event.length; /* a fault of an INT is reported at the INT */
        if (makes_double_fault(&event, d.vector))
            event = (struct event){.present = true, .vector = DF};
        else
            event = (struct event){
                .present = true, .vector = d.vector, .error_code = d.error_code, .address = d.address};
    }
}
