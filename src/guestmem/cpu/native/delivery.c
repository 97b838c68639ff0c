/* One attempt to enter the guest's handler of an exception or interrupt: gate, stack, frame, in all modes.
 *
 * Nothing of the CPU changes before the last memory access is done. Source: Intel SDM vol. 3, chapter 7, and vol. 2,
 * "INT n". Not modelled: task gates and virtual-8086 mode, shadow stacks, segment limits of stacks. */
#include "internal.h"

enum { TASK_GATE = 5, INTERRUPT_16 = 6, TRAP_16 = 7, INTERRUPT_32 = 14, TRAP_32 = 15 };

struct delivery {
    struct cpu *cpu;
    const struct event *event;
    struct event *second; /* the fault that ended it */
    uint64_t rip;
    unsigned cpl, ext, level;

    /* the gate */
    uint16_t selector;
    uint64_t offset;
    bool interrupt;
    unsigned size, ist; /* of a word of the frame; of the IST */
    struct segment_cache code;

    /* where the frame goes */
    bool other_stack;
    struct segment_cache stack;
    uint64_t pointer, base, mask;
};

static enum delivered raise_second(struct delivery *d, int vector, uint32_t error_code)
{
    *d->second = (struct event){.vector = vector, .error_code = error_code};
    return DELIVERY_FAULT;
}

/* What a refused access of the delivery means. */
static enum delivered refused(struct delivery *d)
{
    const struct refusal *why = &d->cpu->refused;
    if (why->kind != REFUSED_GUEST)
        return DELIVERY_REFUSED;
    *d->second = (struct event){.vector = why->vector, .error_code = why->error_code, .address = why->address};
    return DELIVERY_FAULT;
}

static bool push_word(struct delivery *d, uint64_t word)
{
    d->pointer = (d->pointer & ~d->mask) | ((d->pointer - d->size) & d->mask);
    return write_linear(d->cpu, d->base + (d->pointer & d->mask), &word, d->size);
}

/* Through the interrupt vector table: IP and CS, no error code. */
static enum delivered deliver_real(struct delivery *d)
{
    struct uc_env *env = d->cpu->env;
    uint32_t entry;
    int vector = d->event->vector;
    if ((uint32_t)vector * 4 + 3 > env->idt.limit)
        return raise_second(d, GP, (uint32_t)vector * 8 + 2);
    if (!read_linear(d->cpu, env->idt.base + (uint32_t)vector * 4, &entry, 4))
        return refused(d);
    d->pointer = env->regs[RSP], d->base = env->segs[SS].base, d->mask = 0xffff, d->size = 2;
    if (!push_word(d, env->eflags) || !push_word(d, env->segs[CS].selector) || !push_word(d, d->rip))
        return refused(d);
    env->regs[RSP] = d->pointer;
    env->eip = entry & 0xffff;
    env->eflags &= ~(uint64_t)(RFLAGS_IF | RFLAGS_TF | RFLAGS_RF | RFLAGS_AC);
    env->segs[CS].selector = entry >> 16;
    env->segs[CS].base = entry >> 16 << 4;
    update_hflags(d->cpu);
    return DELIVERED;
}

/* The gate of the vector, checked. */
static enum delivered find_gate(struct delivery *d)
{
    const struct uc_env *env = d->cpu->env;
    bool is_long = long_mode(d->cpu);
    uint32_t vector = (uint32_t)d->event->vector, size = is_long ? 16 : 8, error_code = vector * 8 + 2 + d->ext, high = 0;
    uint64_t low;
    if (vector * size + size - 1 > env->idt.limit)
        return raise_second(d, GP, error_code);
    if (!read_linear(d->cpu, env->idt.base + vector * size, &low, 8))
        return refused(d);
    unsigned kind = low >> 40 & 31;
    if (kind == TASK_GATE && !is_long)
        return DELIVERY_UNSUPPORTED;
    if (kind != INTERRUPT_32 && kind != TRAP_32 && (is_long || (kind != INTERRUPT_16 && kind != TRAP_16)))
        return raise_second(d, GP, error_code);
    if (d->event->length && (low >> 45 & 3) < d->cpl)
        return raise_second(d, GP, error_code);
    if (!(low >> 47 & 1))
        return raise_second(d, NP, error_code);
    if (is_long && !read_linear(d->cpu, env->idt.base + vector * size + 8, &high, 4))
        return refused(d);
    d->selector = (uint16_t)(low >> 16);
    d->offset = (low & 0xffff) | (kind >= INTERRUPT_32 ? low >> 32 & 0xffff0000 : 0) | (uint64_t)high << 32;
    d->interrupt = kind == INTERRUPT_16 || kind == INTERRUPT_32;
    d->size = is_long ? 8 : kind >= INTERRUPT_32 ? 4 : 2;
    d->ist = is_long ? low >> 32 & 7 : 0;
    return DELIVERED;
}

/* The segment of `selector`; `vector` is the exception if its table does not reach that far. */
static enum delivered read_descriptor(struct delivery *d, uint16_t selector, int vector, struct segment_cache *segment)
{
    const struct uc_env *env = d->cpu->env;
    const struct segment_cache *table = selector & 4 ? &env->ldt : &env->gdt;
    uint64_t raw;
    if ((uint32_t)(selector & ~7) + 7 > table->limit || (selector & 4 && !(env->ldt.flags & DESC_P)))
        return raise_second(d, vector, (selector & ~3u) | d->ext);
    if (!read_linear(d->cpu, table->base + (selector & ~7u), &raw, 8))
        return refused(d);
    uint32_t limit = (raw & 0xffff) | (raw >> 32 & 0xf0000);
    segment->selector = selector;
    segment->base = (raw >> 16 & 0xffffff) | (raw >> 32 & 0xff000000);
    segment->limit = raw >> 55 & 1 ? limit << 12 | 0xfff : limit;
    segment->flags = raw >> 32 & 0x00f0ff00;
    return DELIVERED;
}

static unsigned dpl(const struct segment_cache *segment)
{
    return segment->flags >> DESC_DPL_SHIFT & 3;
}

/* The handler's code segment. */
static enum delivered find_code(struct delivery *d)
{
    uint32_t error_code = (d->selector & ~3u) | d->ext;
    if (!(d->selector & ~3))
        return raise_second(d, GP, d->ext);
    enum delivered done = read_descriptor(d, d->selector, GP, &d->code);
    if (done != DELIVERED)
        return done;
    uint32_t flags = d->code.flags;
    bool wrong_size = long_mode(d->cpu) && (!(flags & DESC_L) || flags & DESC_B);
    if (!(flags & DESC_S) || !(flags & DESC_CODE) || dpl(&d->code) > d->cpl || wrong_size)
        return raise_second(d, GP, error_code);
    if (!(flags & DESC_P))
        return raise_second(d, NP, error_code);
    /* A conforming handler runs at the level of what it interrupts. */
    d->level = flags & DESC_CONFORMING ? d->cpl : dpl(&d->code);
    return DELIVERED;
}

/* `size` bytes of the task state segment. */
static enum delivered read_tss(struct delivery *d, unsigned offset, void *data, unsigned size)
{
    const struct segment_cache *tr = &d->cpu->env->tr;
    if (offset + size - 1 > tr->limit)
        return raise_second(d, TS, (tr->selector & ~3u) | d->ext);
    return read_linear(d->cpu, tr->base + offset, data, size) ? DELIVERED : refused(d);
}

/* RSP from the IST, from the TSS if the level changes, or as it is; SS becomes null if the level changes. */
static enum delivered find_long_stack(struct delivery *d)
{
    enum delivered done = DELIVERED;
    d->pointer = d->cpu->env->regs[RSP];
    if (d->ist)
        done = read_tss(d, 36 + (d->ist - 1) * 8, &d->pointer, 8);
    else if (d->level < d->cpl)
        done = read_tss(d, 4 + d->level * 8, &d->pointer, 8);
    d->other_stack = d->level < d->cpl;
    d->stack = (struct segment_cache){.selector = d->level, .flags = d->level << DESC_DPL_SHIFT};
    d->pointer &= ~15ull;
    d->base = 0;
    d->mask = ~0ull;
    return done;
}

/* The same without long mode: SS and ESP of the inner level are both in the TSS. */
static enum delivered find_stack(struct delivery *d)
{
    const struct uc_env *env = d->cpu->env;
    d->stack = env->segs[SS];
    d->pointer = env->regs[RSP];
    d->other_stack = d->level < d->cpl;
    if (d->other_stack) {
        bool wide = env->tr.flags >> 8 & 8;
        uint16_t selector = 0;
        d->pointer = 0;
        enum delivered done = read_tss(d, wide ? 4 + d->level * 8 : 2 + d->level * 4, &d->pointer, wide ? 4 : 2);
        if (done == DELIVERED)
            done = read_tss(d, wide ? 8 + d->level * 8 : 4 + d->level * 4, &selector, 2);
        if (done != DELIVERED)
            return done;
        uint32_t error_code = (selector & ~3u) | d->ext;
        if (!(selector & ~3) || (selector & 3) != d->level)
            return raise_second(d, TS, error_code);
        if ((done = read_descriptor(d, selector, TS, &d->stack)) != DELIVERED)
            return done;
        uint32_t flags = d->stack.flags;
        if (!(flags & DESC_S) || dpl(&d->stack) != d->level || (flags >> 8 & 10) != 2)
            return raise_second(d, TS, error_code);
        if (!(flags & DESC_P))
            return raise_second(d, SS_FAULT, error_code);
    }
    d->base = d->stack.base;
    d->mask = d->stack.flags & DESC_B ? 0xffffffff : 0xffff;
    return DELIVERED;
}

static enum delivered push_frame(struct delivery *d)
{
    const struct uc_env *env = d->cpu->env;
    bool exception = !d->event->length && !d->event->external;
    uint64_t words[6];
    unsigned count = 0;
    if (long_mode(d->cpu) || d->other_stack) {
        words[count++] = env->segs[SS].selector;
        words[count++] = env->regs[RSP];
    }
    words[count++] = env->eflags | (exception && is_fault(d->event->vector) ? RFLAGS_RF : 0);
    words[count++] = env->segs[CS].selector;
    words[count++] = d->rip;
    if (exception && has_error_code(d->event->vector))
        words[count++] = d->event->error_code;
    for (unsigned i = 0; i < count; i++)
        if (!push_word(d, words[i])) {
            enum delivered done = refused(d);
            if (done == DELIVERY_FAULT && d->second->vector == GP)
                return raise_second(d, SS_FAULT, d->ext);
            return done;
        }
    return DELIVERED;
}

/* The first instruction of the handler is next. */
static void enter_handler(struct delivery *d)
{
    struct uc_env *env = d->cpu->env;
    if (d->other_stack)
        env->segs[SS] = d->stack;
    d->code.selector = (d->selector & ~3u) | d->level;
    env->segs[CS] = d->code;
    env->regs[RSP] = d->pointer;
    env->eip = d->offset;
    env->eflags &= ~(uint64_t)(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM | (d->interrupt ? RFLAGS_IF : 0));
    update_hflags(d->cpu);
    /* CPL is that of SS, which a conforming or inner handler has changed with it. */
    env->hflags = (env->hflags & ~(uint32_t)HF_CPL) | d->level;
}

enum delivered deliver_once(struct cpu *cpu, const struct event *event, uint64_t rip, struct event *second)
{
    struct delivery d = {.cpu = cpu, .event = event, .second = second, .rip = rip, .ext = event->length ? 0 : 1};
    d.cpl = dpl(&cpu->env->segs[SS]);
    if (cpu->env->eflags & RFLAGS_VM)
        return DELIVERY_UNSUPPORTED;
    if (!(cpu->env->cr[0] & CR0_PE))
        return deliver_real(&d);
    enum delivered done = find_gate(&d);
    if (done == DELIVERED)
        done = find_code(&d);
    if (done == DELIVERED)
        done = long_mode(cpu) ? find_long_stack(&d) : find_stack(&d);
    if (done == DELIVERED)
        done = push_frame(&d);
    if (done == DELIVERED)
        enter_handler(&d);
    return done;
}
